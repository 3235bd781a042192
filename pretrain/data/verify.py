"""Whether shards are sound: every byte is read, and every image decoded and compared with the index."""

import json
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pretrain.data.decode import check_image
from pretrain.data.index import Records, index_path, indexed_samples, open_index, record_type
from pretrain.data.indexing import image_size
from pretrain.data.members import key_and_extension
from pretrain.data.tar import Member, scan
from pretrain.errors import InputError, printable

THREADS = 8  # that decode; the decoders release the interpreter lock
CHUNK = 32  # images in memory
PIECE = 1 << 24  # bytes of another member in memory
NO_RECORDS: Records = np.empty(0, record_type(1))


class Fault(NamedTuple):
    """What is wrong in a shard."""

    shard: Path
    key: str  # of the sample; empty = the shard as a whole
    reason: str

    def __str__(self) -> str:
        """As one line that can be printed, whatever bytes the names are of."""
        place = f"{self.shard}: {self.key}" if self.key else f"{self.shard}"
        return printable(f"{place}: {self.reason}")


def verify_shard(shard: Path) -> Iterator[Fault]:
    """Every fault of a shard and its index, in the order in which they are met."""
    try:
        members = {member.offset: member for member in scan(shard)}
        indexed = indexed_samples(shard) is not None
        records = open_index(index_path(shard)) if indexed else NO_RECORDS
        if not indexed:
            yield Fault(shard, "", "has no index, or one of other content; build it with --index")
        else:
            yield from _missing(shard, records, members.values())
        yield from _read_others(shard, records, members)
        yield from _verify_samples(shard, records, members)
    except InputError as error:
        yield Fault(shard, "", str(error).removeprefix(f"{shard}: "))
    except OSError as error:
        yield Fault(shard, "", error.strerror or str(error))


def _missing(shard: Path, records: Records, members: Iterable[Member]) -> Iterator[Fault]:
    indexed = {key.decode("utf-8", "surrogateescape") for key in records["key"]}
    names = (key_and_extension(member.name) for member in members)
    for key in dict.fromkeys(name[0] for name in names if name):
        if key not in indexed:
            yield Fault(shard, key, "is not in the index; build it anew with --index")


def _read_others(shard: Path, records: Records, members: dict[int, Member]) -> Iterator[Fault]:
    """Read every byte of what is no indexed image; notes must be what they are named."""
    images = set(records["offset"].tolist())
    with shard.open("rb") as file:
        for member in members.values():
            if member.offset in images:
                continue
            if member.name.endswith(".json"):
                if fault := _fault_of_notes(_bytes(file, member.offset, member.size)):
                    yield Fault(shard, member.name, fault)
            else:
                _read_through(file, member)


def _fault_of_notes(content: bytes) -> str:
    try:
        json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    return ""


def _read_through(file: BinaryIO, member: Member) -> None:
    for start in range(0, member.size, PIECE):
        _bytes(file, member.offset + start, min(PIECE, member.size - start))


def _bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _verify_samples(shard: Path, records: Records, members: dict[int, Member]) -> Iterator[Fault]:
    with shard.open("rb") as file, ThreadPoolExecutor(THREADS) as pool:
        for part in _chunks(records):
            contents = [
                _bytes(file, int(record["offset"]), int(record["size"]))
                if _lies_where_indexed(record, members)
                else b""
                for record in part
            ]
            reasons = pool.map(_fault_of_sample, part, contents, [members] * len(part))
            for record, reason in zip(part, reasons, strict=True):
                if reason:
                    yield Fault(shard, record["key"].decode("utf-8", "replace"), reason)


def _chunks(records: Iterable[np.void]) -> Iterator[list[np.void]]:
    remaining = iter(records)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def _fault_of_sample(record: np.void, content: bytes, members: dict[int, Member]) -> str:
    """Why a sample is not what its index says; empty where it is."""
    if not _lies_where_indexed(record, members):
        return "does not lie where the index says; build it anew with --index"
    if zlib.crc32(content) != record["crc32"]:
        return "its bytes differ from the checksum in the index; restore the shard"
    try:
        check_image(content)
        width, height = image_size(content)
    except ValueError as error:
        return f"cannot be decoded ({error})"
    if (width, height) != (record["width"], record["height"]):
        return f"has {width} x {height} pixels, not {record['width']} x {record['height']} as indexed"
    return ""


def _lies_where_indexed(record: np.void, members: dict[int, Member]) -> bool:
    extension = record["extension"].decode("latin-1")
    key = record["key"].decode("utf-8", "surrogateescape")
    image: Any = members.get(int(record["offset"]))
    found = image and image.size == record["size"] and image.name.lower() == f"{key}.{extension}".lower()
    notes: Any = members.get(int(record["json_offset"]))
    return bool(found and (not record["json_offset"] or (notes and notes.size == record["json_size"])))
