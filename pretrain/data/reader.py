"""Bytes of a sample by shard and index. Files are opened on demand, and a few stay open."""

import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.cache import ShardCache
from pretrain.data.index import NO_LABEL, IndexReader, index_path, read_header
from pretrain.data.indexing import ensure_indexes
from pretrain.data.remote import is_remote, shown
from pretrain.data.retry import retry
from pretrain.errors import InputError, TrainingError

MAX_OPEN = 32  # shards open at a time in one process, where the caller does not say
ATTEMPTS = 6  # at reading a sample, likewise

Stamp = tuple[int, int]  # size in bytes and time of the last change of a local tar


class CorruptSample(InputError):
    """A sample that cannot be used, in a shard that can: training replaces it, other readers stop there."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)  # the arguments, so that it can be sent between processes
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        """One line."""
        return f"{self.shard}: sample {self.key}: {self.reason}"


class Item(NamedTuple):
    """A sample as stored."""

    shard: str
    key: str
    image: bytes
    label: int | None


class _OpenShard(NamedTuple):
    tar: int  # descriptor
    records: IndexReader

    def close(self) -> None:
        os.close(self.tar)
        self.records.close()


class Reader:
    """Reads samples of a list of shards; cheap to pickle, and each process opens its own files."""

    def __init__(
        self,
        shards: Sequence[str | Path],
        cache: ShardCache | None = None,
        max_open: int = MAX_OPEN,
        start: int = 0,
        attempts: int = ATTEMPTS,
    ) -> None:
        """Build the missing or outdated indexes of the shards.

        Args:
            shards: tars, local or remote.
            cache: of the remote ones.
            max_open: shards that stay open in one process, if the system allows so many files.
            start: which missing index to build first (`ensure_indexes`).
            attempts: at reading a sample, before an error of the disk or the network counts.

        Raises:
            InputError: a shard is damaged, or an index cannot be written.
            TrainingError: a remote shard cannot be reached.
        """
        self.shards = [str(shard) for shard in shards]
        self.cache, self.max_open, self.attempts = cache, min(max_open, _most_open()), attempts
        self._stamps: list[Stamp | None] = [None] * len(self.shards)  # None: remote
        self.sizes = [0] * len(self.shards)  # samples in each shard
        self.nbytes = [0] * len(self.shards)  # of each tar
        self._index(start)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def _index(self, start: int) -> None:
        remote = [i for i, shard in enumerate(self.shards) if is_remote(shard)]
        local = [i for i, shard in enumerate(self.shards) if not is_remote(shard)]
        paths = [Path(self.shards[i]) for i in local]
        for i, path, size in zip(local, paths, ensure_indexes(paths, start), strict=True):
            self._stamps[i], self.sizes[i] = _stamp(path.stat()), size
        indexes = self._cache_of_remote().indexes_of([self.shards[i] for i in remote]) if remote else []
        for i, index in zip(remote, indexes, strict=True):
            header = read_header(index)
            if header is None:
                raise InputError(f"{index}: was changed while it was read; start again")
            self.sizes[i], self.nbytes[i] = header.samples, header.tar_size

    def _cache_of_remote(self) -> ShardCache:
        assert self.cache is not None, "remote shards need a cache"
        return self.cache

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files."""
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, shard: int, index: int) -> Item:
        """One sample.

        Raises:
            CorruptSample: it has no image, or bytes that are not the ones that were indexed.
            InputError: the shard is gone.
            TrainingError: the shard was replaced since it was indexed, or cannot be read again and again.
        """
        name = shown(self.shards[shard])
        record, image = retry(lambda: self._read(shard, index), name, self.attempts)
        key = record["key"].decode("utf-8", "replace")
        if zlib.crc32(image) != record["crc32"]:
            self._check_unchanged(shard, self._shard(shard))
            raise CorruptSample(name, key, "its bytes differ from the index")
        if not len(image):
            raise CorruptSample(name, key, "has no image" if not record["extension"] else "has zero bytes")
        label = int(record["label"])
        return Item(name, key, image, None if label == NO_LABEL else label)

    def _read(self, shard: int, index: int) -> tuple[np.void, bytes]:
        opened = self._shard(shard)
        try:
            record = opened.records[index]
            size, offset = int(record["size"]), int(record["offset"])
            inside = offset + size <= opened.records.header.tar_size  # else memory for what is not there
            return record, os.pread(opened.tar, size, offset) if inside else b""
        except OSError:  # a stale handle does not recover; another attempt opens the file anew
            self._open.pop(shard).close()
            raise

    def _shard(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == self.max_open:
            self._open.popitem(last=False)[1].close()
        opened = self._open_shard(self.shards[shard])
        self._open[shard] = opened
        self._check_unchanged(shard, opened)
        return opened

    def _open_shard(self, name: str) -> _OpenShard:
        if is_remote(name):
            index = self._cache_of_remote().index_of(name)  # first: it tells how long the copy has to be
            tar = self._open_copy(name)
        else:
            index, tar = index_path(Path(name)), _open_file(Path(name))
        try:
            return _OpenShard(tar, IndexReader(index))
        except BaseException:
            os.close(tar)
            raise

    def _open_copy(self, name: str) -> int:
        while True:
            try:
                return _open_file(self._cache_of_remote().fetch(name))
            except FileNotFoundError:  # evicted in between
                continue

    def _check_unchanged(self, shard: int, opened: _OpenShard) -> None:
        """Whether the tar still is the one that was there when the indexes were seen to."""
        stamp, expected = _stamp(os.fstat(opened.tar)), self._stamps[shard]
        if stamp != expected if expected is not None else stamp[0] != opened.records.header.tar_size:
            advice = "restore it, or start anew to index it"
            raise TrainingError(f"{shown(self.shards[shard])}: was replaced while it is in use; {advice}")

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __del__(self) -> None:
        """Close the files."""
        if "_open" in self.__dict__:
            self.close()


def _most_open() -> int:
    """Shards whose two files take half of what a process may open (`ulimit -n`)."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(files // 4, 1) if files != resource.RLIM_INFINITY else 1 << 20


def _open_file(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns
