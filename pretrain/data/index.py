"""The index beside each shard (`x.tar.idx`): one fixed-size record per sample. No torch.

Any sample is two reads away, and no process holds more of an index than the record that it reads, so a
billion samples cost no memory. The file is a header (magic, bytes of a key, checksum of the layout, bytes of
the tar, samples) and the records, little-endian. `indexing.py` builds it.
"""

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.tar import Member, scan
from pretrain.errors import InputError

MAGIC = b"PTINDEX2"
HEADER = struct.Struct("<8sIIQQ")
NO_LABEL = -1
MAX_KEY_BYTES = 1 << 20  # more is a damaged head: no such record has a type in numpy

Records = np.ndarray[Any, np.dtype[np.void]]


class IndexHeader(NamedTuple):
    """What the head of an index says."""

    magic: bytes
    key_bytes: int  # of the longest key
    layout: int  # `layout_checksum` of the tar
    tar_size: int  # bytes
    samples: int

    @property
    def record_type(self) -> np.dtype[np.void]:
        """The layout of a record."""
        return record_type(self.key_bytes)


def record_type(key_bytes: int) -> np.dtype[np.void]:
    """The layout of a record whose key has at most `key_bytes` bytes."""
    fields = [
        ("key", f"S{key_bytes}"),
        ("offset", "<u8"),  # of the image's bytes in the tar
        ("size", "<u4"),  # 0: the sample has no image, or an empty one
        ("extension", "S5"),
        ("width", "<u4"),  # pixels, as stored (no EXIF rotation); 0: the header of the image cannot be read
        ("height", "<u4"),
        ("crc32", "<u4"),  # of the image's bytes
        ("json_offset", "<u8"),  # 0: no .json member
        ("json_size", "<u4"),
        ("label", "<i8"),  # NO_LABEL: no .cls member
    ]
    return np.dtype(fields)


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(f"{shard.name}.idx")


def read_header(index: Path) -> IndexHeader | None:
    """The head of an index; None where it is missing, incomplete or of another version."""
    try:
        with index.open("rb") as file:
            head, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    if len(head) < HEADER.size:
        return None
    header = IndexHeader(*HEADER.unpack(head))
    if header.magic != MAGIC or header.key_bytes > MAX_KEY_BYTES:
        return None
    if size != HEADER.size + header.samples * header.record_type.itemsize:
        return None
    return header


def indexed_samples(shard: Path) -> int | None:
    """Samples in the index of a shard; None where there is no index, or not one of this tar.

    An index that is older than its shard (a copy in another order, or a shard that was written again) is one
    of this tar if every member has the name, place and size that it had when the index was built.

    Raises:
        InputError: the shard is damaged.
    """
    index, tar = index_path(shard), shard.stat()
    header = read_header(index)
    if header is None or header.tar_size != tar.st_size:
        return None
    if index.stat().st_mtime_ns < tar.st_mtime_ns and header.layout != layout_checksum(scan(shard)):
        return None
    return header.samples


def layout_checksum(members: Iterable[Member]) -> int:
    """CRC-32 over the names, places and sizes of the members of a tar."""
    checksum = 0
    for member in members:
        line = f"{member.name}\0{member.offset}\0{member.size}\n"
        checksum = zlib.crc32(line.encode("utf-8", "surrogateescape"), checksum)
    return checksum


def open_index(index: Path) -> Records:
    """All records of an index. Not mapped, as in `IndexReader`.

    Raises:
        InputError: it is missing or incomplete.
    """
    header = _valid_header(index)
    records = np.fromfile(index, header.record_type, header.samples, offset=HEADER.size)
    if len(records) < header.samples:
        raise _cut_short(index)
    return records


class IndexReader:
    """Reads single records. Not mapped: a file that shrinks under a map kills the process (SIGBUS)."""

    def __init__(self, index: Path) -> None:
        """Open an index that `indexed_samples` or `build_index` has seen.

        Raises:
            InputError: it is gone or incomplete.
        """
        self.path, self.header = index, _valid_header(index)
        self._type = self.header.record_type
        self._file = os.open(index, os.O_RDONLY | os.O_CLOEXEC)

    def __getitem__(self, sample: int) -> np.void:
        """The record of a sample.

        Raises:
            InputError: the file was cut short since it was opened.
        """
        size = self._type.itemsize
        content = os.pread(self._file, size, HEADER.size + sample * size)
        if len(content) < size:
            raise _cut_short(self.path)
        record: np.void = np.frombuffer(content, self._type)[0]
        return record

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _cut_short(index: Path) -> InputError:
    return InputError(f"{index}: was cut short while it was read; remove it to have it built anew")


def _valid_header(index: Path) -> IndexHeader:
    header = read_header(index)
    if header is None:
        raise InputError(f"{index}: is missing or incomplete; build it with `python tools/pack.py --index`")
    return header
