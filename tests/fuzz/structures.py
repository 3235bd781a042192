"""Damage that keeps the rest of a format in order, so that it gets past the first check."""

import json
import struct
import zlib
from random import Random

from tests.fuzz.trees import damage_tree

BLOCK = 512
NUMBERS = (0, 1, 2, 3, 7, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1)
TAR_FIELDS = {  # start and end
    **{"name": (0, 100), "mode": (100, 108), "size": (124, 136), "time": (136, 148)},
    **{"kind": (156, 157), "link": (157, 257), "magic": (257, 265), "prefix": (345, 500)},
}
TAR_KINDS = b"0\x001234567LKxgSDMVX"
NAMES = (
    *(
        b"../../harm.jpg",
        b"/tmp/harm.jpg",
        b"a/../../harm.jpg",
        b".jpg",
        b".",
        b"",
        b"/",
        b"a.cls",
        b"000.json",
    ),
    *(b"\xff\xfe.jpg", b"a b.jpg", b"a\nb.jpg", b"$(touch harm).jpg", b"-rf.jpg", b"a" * 100, b"000001.jpg"),
)
SIZES = (
    b"00000000000\0",
    b"77777777777\0",
    b"-1\0",
    b"99999999999\0",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"x",
)
PAX = (
    *(
        b"12 size=abc\n",
        b"11 size=-1\n",
        b"30 size=99999999999999999999\n",
        b"18 path=../harm.a\n",
        b"999 path=a\n",
    ),
    *(b"10 path=\n\n", b"-5 a=b\n", b"0 a=b\n", b"\xff\xff", b"22 GNU.sparse.major=1\n", b"10 \xff\xff=ab\n"),
)


def damage_tar(random: Random, content: bytes) -> bytes:
    """One field of one header, its checksum right; or an extension header before a member."""
    starts = [i for i in range(0, len(content) - BLOCK, BLOCK) if content[i + 257 : i + 262] == b"ustar"]
    if not starts:
        return content
    start = random.choice(starts)
    if random.random() < 0.2:
        body = random.choice(PAX) if random.random() < 0.7 else random.choice(NAMES)
        kind, size = random.choice(b"xgLK"), b"%011o\0" % len(body)
        header = _checked(_put(_put(content[start : start + BLOCK], "kind", bytes([kind])), "size", size))
        return content[:start] + header + body.ljust(BLOCK, b"\0") + content[start:]
    name = random.choice(list(TAR_FIELDS))
    value = _field(random, name, content[random.choice(starts) :])
    return (
        content[:start]
        + _checked(_put(content[start : start + BLOCK], name, value))
        + content[start + BLOCK :]
    )


def _field(random: Random, name: str, other: bytes) -> bytes:
    """An odd value, or that of another header."""
    start, end = TAR_FIELDS[name]
    match name:
        case "kind":
            return bytes([random.choice(TAR_KINDS)])
        case "size":
            return random.choice((*SIZES, b"%011o\0" % random.randrange(5000)))
        case "name" | "link" | "prefix":
            return random.choice((*NAMES, other[start:end]))
    return random.randbytes(end - start)


def _put(header: bytes, name: str, value: bytes) -> bytes:
    start, end = TAR_FIELDS[name]
    return header[:start] + value[: end - start].ljust(end - start, b"\0") + header[end:]


def _checked(header: bytes) -> bytes:
    total = sum(header) - sum(header[148:156]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


def damage_index(random: Random, content: bytes) -> bytes:
    """One number of the head or of a record of a shard's index."""
    width = random.choice((4, 8))
    start = random.randrange(8, max(len(content) - width, 9))
    if random.random() < 0.3:
        start, width = random.choice(((8, 4), (12, 4), (16, 8), (24, 8)))
    value = random.choice((*NUMBERS, 2**63 - 1, 2**63, 2**64 - 1)) % (1 << 8 * width)
    return content[:start] + value.to_bytes(width, "little") + content[start + width :]


def damage_safetensors(random: Random, content: bytes) -> bytes:
    """The JSON header, its length right most of the time."""
    length = int.from_bytes(content[:8], "little")
    try:
        tree = json.loads(content[8 : 8 + length])
    except ValueError:
        return content
    if random.random() < 0.3:
        _damage_description(random, tree)
    else:
        damage_tree(random, tree)
    header = json.dumps(tree).encode()
    claimed = len(header) if random.random() < 0.9 else random.choice((*NUMBERS, 2**64 - 1))
    return claimed.to_bytes(8, "little") + header + content[8 + length :]


def _damage_description(random: Random, tree: dict[str, dict[str, str]]) -> None:
    """What travels inside the header as text: the description of our exports."""
    for name, text in tree.get("__metadata__", {}).items():
        if text.startswith("{"):
            tree["__metadata__"][name] = json.dumps(damage_tree(random, json.loads(text)))


def damage_image(random: Random, content: bytes) -> bytes:
    """A number of a header of a PNG (checksum right), JPEG, TIFF or another file."""
    if content.startswith(b"\x89PNG"):
        return _damage_png(random, content)
    if content.startswith((b"II", b"MM")):
        return _damage_tiff(random, content)
    marks = [i for i in range(len(content) - 20) if content[i] == 0xFF and 0xC0 <= content[i + 1] < 0xFF]
    start = random.choice(marks) + random.randrange(2, 12) if marks else random.randrange(40)
    return _number(random, content, start, 2, "big")


def _damage_png(random: Random, content: bytes) -> bytes:
    """A field of IHDR, or a chunk's length."""
    if random.random() < 0.2:
        return _number(random, content, random.choice((8, 33)), 4, "big")
    start, width = random.choice(((16, 4), (20, 4), (24, 1), (25, 1), (26, 1), (27, 1), (28, 1)))
    content = _number(random, content, start, width, "big")
    return content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]


def _damage_tiff(random: Random, content: bytes) -> bytes:
    """The kind, count or value of an entry of the first directory, or where that lies."""
    order = "little" if content.startswith(b"II") else "big"
    directory = int.from_bytes(content[4:8], order)
    entries = int.from_bytes(content[directory : directory + 2], order)
    if not entries or random.random() < 0.1:
        return _number(random, content, 4, 4, order)
    entry = directory + 2 + 12 * random.randrange(entries)
    start, width = random.choice(((0, 2), (2, 2), (4, 4), (8, 4), (8, 2)))
    return _number(random, content, entry + start, width, order)


def _number(random: Random, content: bytes, start: int, width: int, order: str) -> bytes:
    value = random.choice(NUMBERS) % (1 << 8 * width)
    return content[:start] + value.to_bytes(width, order) + content[start + width :]
