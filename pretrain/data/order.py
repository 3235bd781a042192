"""Which sample stands at which position: a pure function of (shard sizes, seed, position). No torch.

A position counts samples since the start of the run and runs on over epochs. Permutations of any size are
keyed bijections computed one element at a time, so a billion samples need no list and any position is reached
at once.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

from pretrain.errors import InputError
from pretrain.seeding import stream_key

Shuffle = Literal["block", "full", "none"]
ROUNDS = 16  # with 8, the 720 orders of 6 elements are not equally likely; with 16 they are
MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample by its place in the data set, and the epoch in which it is read."""

    epoch: int
    shard: int
    index: int


class Permutation:
    """A keyed bijection of range(size): `permutation(i)` is the element at place i."""

    def __init__(self, size: int, key: int) -> None:
        """`size` >= 1; `key` is 128 bits."""
        self.size = size
        self.rows = math.isqrt(size - 1) + 1  # of a grid that holds every element, and few cells more
        self.columns = -(-size // self.rows)
        digest = hashlib.shake_128(key.to_bytes(16, "little")).digest(8 * ROUNDS)
        self.keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 8 * ROUNDS, 8)]

    def __call__(self, place: int) -> int:
        """The element at a place; the few cells of the grid beyond `size` are walked through."""
        place = self._cell(place)
        while place >= self.size:
            place = self._cell(place)
        return place

    def _cell(self, place: int) -> int:
        """A Feistel network on (row, column): each round adds to one half a hash of the other."""
        row, column = divmod(place, self.columns)
        for i in range(0, ROUNDS, 2):
            row = (row + _mix(column ^ self.keys[i])) % self.rows
            column = (column + _mix(row ^ self.keys[i + 1])) % self.columns
        return row * self.columns + column


def _mix(x: int) -> int:
    """A 64-bit hash of a 64-bit integer: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class _ShardOrder(NamedTuple):
    """The shards of one epoch in reading order, and the samples up to the end of each."""

    shards: Sequence[int]
    ends: Sequence[int]

    def locate(self, place: int) -> tuple[int, int]:
        """(shard, index in the shard) of the sample at a place of this order."""
        i = bisect_right(self.ends, place)
        return self.shards[i], place - (self.ends[i - 1] if i else 0)


class Order:
    """The endless sequence of samples of a run."""

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, shuffle: Shuffle, open_shards: int, source: int = 0
    ) -> None:
        """Order the samples of a data set.

        Args:
            shard_sizes: samples in each shard.
            seed: of the run.
            shuffle: none: as stored. full: a permutation of all samples, new in each epoch. block: the shards
                are permuted, and the samples of each `open_shards` consecutive ones are permuted among
                themselves.
            open_shards: shards in a block.
            source: number of this data set among those that are mixed; each has an order of its own.

        Raises:
            InputError: there is no sample.
        """
        self.sizes = list(shard_sizes)
        self.length = sum(self.sizes)
        if not self.length:
            raise InputError("the shards hold no sample")
        self.seed, self.shuffle, self.open_shards = seed, shuffle, open_shards
        self._ids = (f"source {source}",) if source else ()
        self._stored = _ShardOrder(range(len(self.sizes)), list(accumulate(self.sizes)))
        self._cached: tuple[int, _ShardOrder] | None = (
            None  # a batch may span two epochs, but order does not go back
        )

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.length

    def at(self, position: int) -> Sample:
        """The sample at a position of the run."""
        epoch, place = divmod(position, self.length)
        match self.shuffle:
            case "none":
                shard, index = self._stored.locate(place)
            case "full":
                shard, index = self._stored.locate(
                    _permutation(self.length, self.seed, "samples", epoch, *self._ids)(place)
                )
            case "block":
                shard, index = self._in_block(epoch, place)
        return Sample(epoch, shard, index)

    def nearby(self, position: int) -> list[int]:
        """The shards that are read around a position and next, in the same epoch; all in a full shuffle."""
        epoch, place = divmod(position, self.length)
        if self.shuffle == "full":
            return list(range(len(self.sizes)))
        order = self._stored if self.shuffle == "none" else self._shard_order(epoch)
        span = 1 if self.shuffle == "none" else self.open_shards
        first = bisect_right(order.ends, place) // span * span
        return [shard for shard in order.shards[first : first + 2 * span] if self.sizes[shard]]

    def _in_block(self, epoch: int, place: int) -> tuple[int, int]:
        order = self._shard_order(epoch)
        block = bisect_right(order.ends, place) // self.open_shards
        first, end = block * self.open_shards, min((block + 1) * self.open_shards, len(self.sizes))
        start = order.ends[first - 1] if first else 0
        permutation = _permutation(order.ends[end - 1] - start, self.seed, "block", epoch, block, *self._ids)
        return order.locate(start + permutation(place - start))

    def _shard_order(self, epoch: int) -> _ShardOrder:
        if self._cached is None or self._cached[0] != epoch:
            permutation = _permutation(len(self.sizes), self.seed, "shards", epoch, *self._ids)
            shards = [permutation(i) for i in range(len(self.sizes))]
            self._cached = epoch, _ShardOrder(shards, list(accumulate(self.sizes[shard] for shard in shards)))
        return self._cached[1]


@lru_cache(maxsize=64)
def _permutation(size: int, seed: int, purpose: str, *ids: int | str) -> Permutation:
    return Permutation(size, stream_key(seed, "order", purpose, *ids))
