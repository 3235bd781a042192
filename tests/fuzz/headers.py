"""Damage to the headers of DICOM and NIfTI files and to the footer of parquet files."""

import gzip
import struct
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from tests.fuzz.mutations import damage, flip_bits, set_edges
from tests.fuzz.structures import NUMBERS

DICOM_START = 132  # bytes before the first element
UNDEFINED = 0xFFFFFFFF  # a length: up to an end mark
MAX_VALUE = 1 << 16  # bytes of a damaged value
LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT"})  # 4 bytes of length
SHORTS, LONGS = (b"US", b"SS"), (b"UL", b"SL")
TEXTS = (
    *(b"", b"0", b"1", b"-1", b"2147483647", b"99999999999", b"1e400", b"nan", b"1\\2", b"x", b"\xff\xfe"),
    *(
        b"MONOCHROME1",
        b"MONOCHROME2",
        b"RGB",
        b"YBR_FULL",
        b"PALETTE COLOR",
        b"../../harm",
        b"a\nb",
        b"A" * 70,
    ),
    b"A" * 70,
    b"1.2.840.10008.1.2",  # transfer syntaxes: implicit, deflated, big endian, JPEG, RLE
    *(b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.5"),
)
NIFTI_FIELDS = (  # start, format
    *((0, "<i"), *((40 + 2 * i, "<h") for i in range(8)), *((40 + 2 * i, "<h") for i in range(1, 4))),
    *((70, "<h"), (72, "<h"), (108, "<f"), (112, "<f"), (116, "<f"), (252, "<h"), (254, "<h"), (344, "<i")),
    *((348, "<i"), (352, "<i"), (356, "<i")),
)
VALUES = {  # by format
    "<h": (0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 256, 512, 1792, 2304, 32_767, -32_768),
    "<i": (0, 1, -1, 16, 348, 540, 2**31 - 1, -(2**31)),
    "<f": (0.0, 1.0, -1.0, 1e-40, 1e38, 352.0, 353.0, 1e9, float("nan"), float("inf")),
}
PARQUET_MARK = b"PAR1"


class _Element(NamedTuple):
    """An element of a DICOM file: its length's place and width, and its value."""

    kind: bytes
    length_at: int
    width: int
    start: int
    size: int


def damage_dicom(random: Random, content: bytes) -> bytes:
    """An odd value, or an odd length, of one element at the top."""
    elements = list(_elements(content))
    if not elements:
        return content
    element = random.choice(elements)
    before, after = content[: element.length_at], content[element.start + element.size :]
    if random.random() < 0.1:
        length = random.choice(NUMBERS) % (1 << 8 * element.width)
        return before + length.to_bytes(element.width, "little") + content[element.start :]
    value = _odd_value(random, element.kind, content[element.start : element.start + element.size])
    value += b" " * (len(value) % 2)  # lengths are even
    return before + len(value).to_bytes(element.width, "little") + value + after


def _odd_value(random: Random, kind: bytes, value: bytes) -> bytes:
    if kind in SHORTS or kind in LONGS:
        width = 2 if kind in SHORTS else 4
        return (random.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little") + value[width:]
    return damage(random, value)[:MAX_VALUE] if kind in LONG else random.choice(TEXTS)


def _elements(content: bytes) -> Iterator[_Element]:
    position = DICOM_START
    while position + 8 <= len(content):
        kind = content[position + 4 : position + 6]
        length_at, width = (position + 8, 4) if kind in LONG else (position + 6, 2)
        start = length_at + width
        size = int.from_bytes(content[length_at:start], "little")
        if size == UNDEFINED:
            return
        yield _Element(kind, length_at, width, start, size)
        position = start + size


def damage_nifti(random: Random, content: bytes) -> bytes:
    """One or two numbers of the header, inside of the compression where there is one."""
    if content.startswith(b"\x1f\x8b"):
        return gzip.compress(damage_nifti(random, gzip.decompress(content)), mtime=0)
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2))):
        start, form = random.choice(NIFTI_FIELDS)
        struct.pack_into(form, changed, start, random.choice(VALUES[form]))
    return bytes(changed)


def damage_parquet(random: Random, content: bytes) -> bytes:
    """Bytes of the footer, which says what lies where, or of the header of the first page."""
    end = len(content) - 8
    start = end - int.from_bytes(content[end : end + 4], "little")
    if random.random() < 0.2:
        start, end = len(PARQUET_MARK), 44
    part = random.choice((flip_bits, set_edges, set_edges))(random, content[start:end])
    return content[:start] + part + content[end:]
