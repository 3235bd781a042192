"""Encoded images to webdataset tar shards, with the index beside each."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import TarWriter

from pretrain.data.index import index_path
from pretrain.data.indexing import build_index
from pretrain.errors import InputError

SampleTuple = tuple[str, str, bytes, int | None, Mapping[str, Any]]  # the fields of `PackedSample`
PREFIX = re.compile(r"\w[\w.-]*")  # no folder, and no wildcard
FIXED_TIME = 0.0  # of every member: equal samples give equal shards


class PackedSample(NamedTuple):
    """A sample to be written."""

    key: str  # unique, without dots
    extension: str  # of the image's format, such as jpg
    image: bytes  # encoded; written as it is
    label: int | None  # class number; None = no .cls member
    meta: Mapping[str, Any]  # the .json member


def write_shards(
    samples: Iterable[SampleTuple], folder: Path, prefix: str, samples_per_shard: int
) -> list[Path]:
    """Write `prefix-000000.tar` and so on, with their indexes; the shards' paths.

    A shard gets its name when it is complete: what an interrupted run leaves under a final name can be used.

    Args:
        samples: in the order of writing; consumed one by one.
        folder: made if missing; files of the same names are replaced.
        prefix: of the shards' names.
        samples_per_shard: the last shard may hold fewer.

    Raises:
        InputError: a key has a dot in it, or `samples_per_shard` is not positive.
    """
    if samples_per_shard < 1:
        raise InputError(f"samples per shard must be at least 1, not {samples_per_shard}")
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, part in enumerate(_parts(samples, samples_per_shard)):
        shards.append(folder / f"{prefix}-{number:06d}.tar")
        _write_shard(part, shards[-1])
    return shards


def clear_shards(folder: Path, prefix: str, force: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse, or with `force` remove, shards of the prefix: old and new ones would be read as one data set.

    Args:
        folder: of the shards.
        prefix: of their names.
        force: remove them.
        sources: files that are still to be read.

    Raises:
        InputError: the prefix is no part of a name, there are shards and `force` is not given, or one of them
            is still to be read.
    """
    if not PREFIX.fullmatch(prefix):
        raise InputError(f"--prefix {prefix!r}: must be letters, digits, dots, dashes and underscores")
    name = re.compile(re.escape(prefix) + r"-\d{6,}\.tar")  # not those of train-extra, with train
    shards = sorted(path for path in folder.glob("*.tar") if name.fullmatch(path.name))
    needed = {source.resolve() for source in sources}
    for shard in shards:
        if shard.resolve() in needed:
            raise InputError(f"{shard}: is to be packed itself; give another folder or --prefix")
    if shards and not force:
        raise InputError(f"{folder}: has {len(shards)} {prefix}-*.tar already; --force replaces them")
    for shard in shards:
        shard.unlink()
        index_path(shard).unlink(missing_ok=True)


def _parts(samples: Iterable[SampleTuple], size: int) -> Iterator[Iterator[SampleTuple]]:
    """Consecutive runs of at most `size` samples; nothing is held, so use up each run before the next."""
    remaining = iter(samples)
    for first in remaining:
        yield chain([first], islice(remaining, size - 1))


def _write_shard(samples: Iterable[SampleTuple], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file, TarWriter(file, mtime=FIXED_TIME) as tar:
            for sample in samples:
                tar.write(_members(PackedSample(*sample)))
        build_index(temporary)
        index_path(temporary).replace(index_path(path))  # first: an index without its shard is harmless
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        index_path(temporary).unlink(missing_ok=True)


def _members(sample: PackedSample) -> dict[str, Any]:
    """The sample as webdataset's writer takes it."""
    if "." in sample.key:
        raise InputError(f"key {sample.key!r}: a dot would end the key; replace it")
    members: dict[str, Any] = {
        "__key__": sample.key,
        sample.extension: sample.image,
        "json": dict(sample.meta),
    }
    if sample.label is not None:
        members["cls"] = sample.label
    return members
