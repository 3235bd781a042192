"""A strict scan of the headers of an uncompressed tar file.

Lenient readers stop at the first header they do not understand, and the rest of a shard goes missing without
a word. Here a wrong checksum, a cut file and a missing end mark are errors. Names may be ustar, GNU long or
pax.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import InputError

BLOCK = 512
EMPTY = bytes(BLOCK)
MAX_EXTENSION = 1 << 20  # bytes of an extension header; a damaged one could claim the whole file
MAX_DIGITS = 12  # of the length of a line in a pax header
MAX_NAME = 4096  # bytes; no file system has longer paths
REGULAR = frozenset(b"0\x007")
WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders, pipes: a size in their header means nothing
EXTENSIONS = frozenset(b"LKxg")  # long name, long link, pax, pax for all that follow
LONG_NAME, PAX, SPARSE = b"LxS"


class Member(NamedTuple):
    """A regular file inside a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass
class _Pending:
    """What an extension header says about the member that follows it."""

    name: str | None = None
    size: int | None = None


def scan(path: Path) -> Iterator[Member]:
    """Every regular file of a tar, in file order.

    Raises:
        InputError: the file is damaged, cut short, compressed or not a tar; names the file and the byte.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < BLOCK:
            raise InputError(f"{path}: is empty or cut short at byte {size}; restore or re-pack it")
        yield from _members(file.fileno(), size, path)


def _members(file: int, end: int, path: Path) -> Iterator[Member]:
    position, pending = 0, _Pending()
    while (header := _header(file, path, position)) != EMPTY:
        kind, start = header[156], position + BLOCK
        size = 0 if kind in WITHOUT_DATA else _size(header, pending, path, position)
        if start + size > end:
            raise InputError(
                f"{path}: byte {position}: member of {size} bytes in a file that ends at byte {end} "
                f"(cut short); restore it"
            )
        if kind == SPARSE:
            raise InputError(f"{path}: byte {position}: sparse members are not supported; re-pack the shard")
        if kind in REGULAR:
            yield Member(_checked(pending.name or _name(header), path, position), start, size)
        pending = _extended(file, kind, start, size, pending, path) if kind in EXTENSIONS else _Pending()
        position = start + (size + BLOCK - 1) // BLOCK * BLOCK


def _header(file: int, path: Path, position: int) -> bytes:
    """The header at a byte, its checksum right; EMPTY where the tar ends."""
    # Read, not mapped: a mapped file that somebody cuts short kills the process (SIGBUS) instead of an error.
    header = os.pread(file, BLOCK, position)
    if len(header) < BLOCK:
        raise InputError(
            f"{path}: byte {position}: ends without the end mark of a tar (cut short); restore it"
        )
    if header != EMPTY:
        _verify(header, path, position)
    return header


def _extended(file: int, kind: int, start: int, size: int, pending: _Pending, path: Path) -> _Pending:
    """`pending` with what the extension header adds whose `size` bytes begin at `start`."""
    if size > MAX_EXTENSION:
        raise InputError(
            f"{path}: byte {start - BLOCK}: extension header of {size} bytes; restore or re-pack the shard"
        )
    content = os.pread(file, size, start)
    try:
        return _extension(kind, content, pending) if content else _Pending()
    except (ValueError, IndexError) as error:  # header checksums do not cover what a pax header holds
        fault = f"{path}: byte {start}: damaged pax header; restore or re-pack the shard"
        raise InputError(fault) from error


def _verify(header: bytes, path: Path, position: int) -> None:
    """Compare the header's checksum: the sum of its bytes, its own field counted as spaces."""
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if total == _octal(header[148:156]):
        return
    if position == 0:
        raise InputError(f"{path}: is not an uncompressed tar file (or its first header is damaged)")
    raise InputError(
        f"{path}: byte {position}: damaged tar header (wrong checksum); restore or re-pack the shard"
    )


def _octal(field: bytes) -> int:
    """An octal number field; -1 where there is none."""
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _size(header: bytes, pending: _Pending, path: Path, position: int) -> int:
    """Bytes of the member: from a pax header, in base 256, or in octal."""
    field = header[124:136]
    if pending.size is not None:
        size = pending.size
    else:
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if size < 0:
        raise InputError(
            f"{path}: byte {position}: damaged tar header (no size); restore or re-pack the shard"
        )
    return size


def _name(header: bytes) -> str:
    """The name in the header, after the ustar prefix where there is one (GNU keeps other fields there)."""
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _checked(name: str, path: Path, position: int) -> str:
    """A name, unless it is longer than any path: an index holds as many bytes for every key."""
    if len(name) > MAX_NAME:
        raise InputError(f"{path}: byte {position}: a name of {len(name)} letters; re-pack the shard")
    return name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _extension(kind: int, content: bytes, pending: _Pending) -> _Pending:
    """`pending` with what one extension header adds."""
    if kind == LONG_NAME:
        return _Pending(_text(content), pending.size)
    if kind == PAX:
        records = _pax_records(content)
        size = int(records["size"]) if "size" in records else pending.size
        return _Pending(records.get("path", pending.name), size)
    return pending


def _pax_records(content: bytes) -> dict[str, str]:
    """The `length key=value` lines of a pax header; the length counts the whole line."""
    records, start, end = {}, 0, len(content.rstrip(b"\0"))
    while start < end:
        space = content.index(b" ", start, start + MAX_DIGITS)
        line = content[space + 1 : start + int(content[start:space])]
        if not line.endswith(b"\n") or start + int(content[start:space]) > len(content):
            raise ValueError("a line has another length than it says")
        key, _, value = line[:-1].partition(b"=")
        records[key.decode("utf-8")] = value.decode("utf-8", "surrogateescape")
        start = space + 1 + len(line)
    return records
