"""Bytes of a sample by shard and index. Files are opened on demand, and a few stay open."""

import os
import sys
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.index import NO_LABEL, Records, ensure_index, indexed_samples, open_index
from pretrain.errors import InputError

MAX_OPEN = (
    32  # shards open at a time in one process; block shuffling reads from `data.open_shards` (16) at a time
)


class Item(NamedTuple):
    """A sample as stored."""

    key: str
    image: bytes
    label: int | None


class _OpenShard(NamedTuple):
    descriptor: int
    records: Records


class Reader:
    """Reads samples of a list of shards; cheap to pickle, and each process opens its own files."""

    def __init__(self, shards: Sequence[Path]) -> None:
        """Build the missing or outdated indexes of the shards.

        Raises:
            InputError: a shard is damaged, or an index cannot be written.
        """
        self.shards = list(shards)
        _announce([shard for shard in self.shards if indexed_samples(shard) is None])
        self.sizes = [ensure_index(shard) for shard in self.shards]  # samples in each shard
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files."""
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, shard: int, index: int) -> Item:
        """One sample.

        Raises:
            InputError: the bytes are not the ones that were indexed; names shard and key.
        """
        record = self._shard(shard).records[index]
        key = record["key"].decode("utf-8", "replace")
        image = os.pread(self._shard(shard).descriptor, int(record["size"]), int(record["offset"]))
        if zlib.crc32(image) != record["crc32"]:
            raise InputError(
                f"{self.shards[shard]}: sample {key}: its bytes differ from the index; restore the shard"
            )
        label = int(record["label"])
        return Item(key, image, None if label == NO_LABEL else label)

    def _shard(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) == MAX_OPEN:
                os.close(self._open.popitem(last=False)[1].descriptor)
            path = self.shards[shard]
            self._open[shard] = _OpenShard(os.open(path, os.O_RDONLY | os.O_CLOEXEC), open_index(path))
        return self._open[shard]

    def __del__(self) -> None:
        """Close the files."""
        for shard in self.__dict__.get("_open", {}).values():
            os.close(shard.descriptor)


def _announce(missing: Sequence[Path]) -> None:
    """Indexing reads whole shards, which can take a while before the first step."""
    if missing:
        count = f"{len(missing)} shards, from {missing[0]} on" if len(missing) > 1 else f"{missing[0]}"
        print(f"building the index of {count} (once)", file=sys.stderr, flush=True)
