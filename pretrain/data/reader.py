"""Bytes of a sample by shard and index. Files are opened on demand, and a few stay open."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.index import NO_LABEL, IndexReader, index_path
from pretrain.data.indexing import ensure_indexes
from pretrain.errors import TrainingError

MAX_OPEN = 32  # shards open at a time in one process, where the caller does not say


class CorruptSample(ValueError):
    """A sample that cannot be used, in a shard that can."""

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

    def __init__(self, shards: Sequence[Path], max_open: int = MAX_OPEN, start: int = 0) -> None:
        """Build the missing or outdated indexes of the shards.

        Args:
            shards: tars.
            max_open: shards that stay open in one process.
            start: which missing index to build first (`ensure_indexes`).

        Raises:
            InputError: a shard is damaged, or an index cannot be written.
        """
        self.shards = list(shards)
        self.sizes = ensure_indexes(self.shards, start)  # samples in each shard
        self._stamps = [_stamp(shard.stat()) for shard in self.shards]
        self.max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files."""
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, shard: int, index: int) -> Item:
        """One sample.

        Raises:
            CorruptSample: it has no image, or bytes that are not the ones that were indexed.
            TrainingError: the shard was replaced since it was indexed.
        """
        opened = self._shard(shard)
        record = opened.records[index]
        name, key = str(self.shards[shard]), record["key"].decode("utf-8", "replace")
        size = int(record["size"])
        image = os.pread(opened.tar, size, int(record["offset"]))
        if zlib.crc32(image) != record["crc32"]:
            self._check_unchanged(shard, opened)
            raise CorruptSample(name, key, "its bytes differ from the index")
        if not size:
            raise CorruptSample(name, key, "has no image" if not record["extension"] else "has zero bytes")
        return Item(name, key, image, _label(record))

    def _shard(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == self.max_open:
            self._open.popitem(last=False)[1].close()
        path = self.shards[shard]
        opened = _OpenShard(os.open(path, os.O_RDONLY | os.O_CLOEXEC), IndexReader(index_path(path)))
        self._open[shard] = opened
        self._check_unchanged(shard, opened)
        return opened

    def _check_unchanged(self, shard: int, opened: _OpenShard) -> None:
        """Whether the tar still is the one that was there when the indexes were seen to."""
        if _stamp(os.fstat(opened.tar)) != self._stamps[shard]:
            path = self.shards[shard]
            raise TrainingError(
                f"{path}: was replaced while it is in use; restore it, or start anew to index it"
            )

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __del__(self) -> None:
        """Close the files."""
        if "_open" in self.__dict__:
            self.close()


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _label(record: np.void) -> int | None:
    label = int(record["label"])
    return None if label == NO_LABEL else label
