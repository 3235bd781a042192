"""Building the indexes of shards: each tar is scanned once, strictly, and every image's bytes are summed.

A tar that cannot be followed from header to header is an error that names the shard and the byte. A single
sample that cannot be used (no image, no bytes, not an image) is kept in the index: reading it tells what is
wrong, and training counts and replaces it.
"""

import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from rich.console import Console
from rich.progress import track

from pretrain.data.fork_server import start_fork_server
from pretrain.data.formats import stored_size
from pretrain.data.index import (
    HEADER,
    MAGIC,
    NO_LABEL,
    IndexHeader,
    Records,
    index_path,
    indexed_samples,
    layout_checksum,
    record_type,
)
from pretrain.data.members import CLASS_NUMBER, IMAGE_EXTENSIONS, key_and_extension
from pretrain.data.tar import Member, scan
from pretrain.errors import InputError

THREADS = 8  # that look at files
MAX_PROCESSES = 16  # more would only wait for the disk
MAX_MEMBER = 2**31 - 1  # bytes of an image or its notes: more is not read at once
MAX_LABEL = 64  # bytes of a class number
FEWEST_SHARDS = 4  # for each process: starting one takes longer than indexing a few


@dataclass
class _Members:
    """The members of one sample that the index knows about."""

    image: Member | None = None
    extension: str = ""
    json: Member | None = None
    label: int = NO_LABEL
    seen: set[str] = field(default_factory=set)


def ensure_indexes(shards: Sequence[Path], start: int = 0) -> list[int]:
    """Build the indexes that are missing or not of their tar, in parallel; the samples of each shard.

    Args:
        shards: tars.
        start: of the missing ones, which to begin with: ranks that begin at different ones share the work.

    Raises:
        InputError: a shard is damaged, or its folder is not writable.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        counts = list(pool.map(indexed_samples, shards))
    missing = [i for i, count in enumerate(counts) if count is None]
    if missing:
        start %= len(missing)
        missing = missing[start:] + missing[:start]
        built = in_processes(ensure_index, [shards[i] for i in missing])
        for i, count in zip(missing, _with_progress(built, [shards[i] for i in missing]), strict=True):
            counts[i] = count
    return [count for count in counts if count is not None]


def build_indexes(shards: Sequence[Path]) -> Iterator[int]:
    """Build the index of each shard anew; the number of its samples, in the order of the shards.

    Raises:
        InputError: a shard is damaged, or its folder is not writable.
    """
    return in_processes(build_index, shards)


def in_processes(build: Callable[[Path], int], shards: Sequence[Path]) -> Iterator[int]:
    """The results for the shards in their order, from several processes where there are many shards.

    Raises:
        InputError: one of the processes was killed.
    """
    processes = min(len(shards) // FEWEST_SHARDS, available_cores(), MAX_PROCESSES)
    if processes < 2:
        yield from map(build, shards)
        return
    start_fork_server()
    pool = ProcessPoolExecutor(processes, get_context("forkserver"), _listen_to_the_pool)
    try:
        yield from pool.map(build, shards)
    except BrokenProcessPool as error:
        raise InputError(
            "a process that builds indexes was killed, for want of memory perhaps; start again: the indexes "
            "that it and the others have built are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use; batch systems and containers give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _listen_to_the_pool() -> None:
    """Ctrl-C is for the process that waits for the results, SIGTERM is how a broken pool ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _with_progress(built: Iterable[int], shards: Sequence[Path]) -> Iterable[int]:
    """Indexing reads whole shards, which can take a while before the first step."""
    count = f"{len(shards)} shards, from {shards[0]} on" if len(shards) > 1 else f"{shards[0]}"
    print(f"building the index of {count} (once)", file=sys.stderr, flush=True)
    console = Console(stderr=True)
    return track(built, "indexing", len(shards), console=console) if console.is_terminal else built


def ensure_index(shard: Path) -> int:
    """Build the index of a shard unless there is one of this tar; the number of samples.

    Raises:
        InputError: the shard is damaged, or its folder is not writable.
    """
    samples = indexed_samples(shard)
    return build_index(shard) if samples is None else samples


def build_index(shard: Path, index: Path | None = None) -> int:
    """Scan a shard and write its index; the number of samples.

    Args:
        shard: the tar.
        index: where to write; default: beside the shard.

    Raises:
        InputError: the shard is damaged, has one member twice, or the folder is not writable.
    """
    with shard.open("rb") as file:
        tar_size = os.fstat(file.fileno()).st_size
        members = list(scan(shard))
        records = _records(_group(members, file.fileno(), shard), file.fileno())
    header = IndexHeader(
        MAGIC, records.dtype["key"].itemsize, layout_checksum(members), tar_size, len(records)
    )
    _write(index or index_path(shard), HEADER.pack(*header) + records.tobytes(), shard)
    return len(records)


def _group(members: Iterable[Member], descriptor: int, shard: Path) -> dict[str, _Members]:
    """Members by key, in the order in which keys first appear; samples may be interleaved."""
    groups: dict[str, _Members] = {}
    for member in members:
        name = key_and_extension(member.name)
        if name is None:
            continue
        key, extension = name
        sample = groups.setdefault(key, _Members())
        if extension in sample.seen:
            raise InputError(
                f"{shard}: byte {member.offset}: {member.name} is in the shard twice; re-pack it"
            )
        sample.seen.add(extension)
        _add(sample, member, extension, descriptor, shard)
    return groups


def _add(sample: _Members, member: Member, extension: str, descriptor: int, shard: Path) -> None:
    if member.size > MAX_MEMBER:
        raise InputError(
            f"{shard}: byte {member.offset}: {member.name} has {member.size} bytes, more than {MAX_MEMBER}; "
            "re-pack the shard without it"
        )
    if extension in IMAGE_EXTENSIONS and sample.image is None:
        sample.image, sample.extension = member, extension
    elif extension == "json":
        sample.json = member
    elif extension == "cls":
        content = os.pread(descriptor, min(member.size, MAX_LABEL), member.offset)
        if member.size > MAX_LABEL or not CLASS_NUMBER.fullmatch(content):
            raise InputError(
                f"{shard}: byte {member.offset}: {member.name} holds {content[:20]!r}, not a class number"
            )
        sample.label = int(content)


def _records(groups: dict[str, _Members], descriptor: int) -> Records:
    keys = [key.encode("utf-8", "surrogateescape") for key in groups]
    records = np.zeros(len(keys), record_type(max(map(len, keys), default=1)))
    for i, (key, sample) in enumerate(zip(keys, groups.values(), strict=True)):
        records[i] = _record(key, sample, descriptor)
    return records


def _record(key: bytes, sample: _Members, descriptor: int) -> tuple[Any, ...]:
    image = sample.image or Member("", 0, 0)
    content = os.pread(descriptor, image.size, image.offset)
    try:
        width, height = image_size(content)
    except ValueError:
        width, height = 0, 0
    json_place = (sample.json.offset, sample.json.size) if sample.json else (0, 0)
    place = (image.offset, image.size, sample.extension.encode())
    return (key, *place, width, height, zlib.crc32(content), *json_place, sample.label)


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) in pixels from an image's header.

    Raises:
        ValueError: the bytes are not an image.
    """
    if content[:2] == b"\xff\xd8":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
        except ValueError:
            pass  # Pillow accepts more
        else:
            return width, height
    return stored_size(content)


def _write(path: Path, content: bytes, shard: Path) -> None:
    """Write under a temporary name and rename: several ranks may build the same index at once."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot write the index ({error.strerror}); make the folder writable or run "
            f"`python tools/pack.py --index {shard}` where it is"
        ) from error
