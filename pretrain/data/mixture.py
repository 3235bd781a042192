"""Several data sets in one sequence, at fixed shares: a pure function of the position. No torch.

Shares are whole thousandths, and a pattern of 1,000 places repeats through the run. So any 1,000 consecutive
positions hold exactly the shares, wherever they begin, and a source's place in its own order is computed, not
counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from pretrain.data.order import Order
from pretrain.errors import InputError

WINDOW = 1_000


@dataclass(frozen=True, slots=True)
class Place:
    """A sample in the shards of all sources, and where its own source stands."""

    source: int
    epoch: int  # of the source
    shard: int  # counted through the shards of all sources
    index: int  # in the shard


class Mixture:
    """The endless sequence of samples of a run."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        """Mix sources.

        Args:
            orders: of each source.
            weights: of each source, above 0; only their ratios count.

        Raises:
            InputError: a source's share is below a thousandth.
        """
        self.orders = list(orders)
        self.counts = window_counts(weights)
        self._pattern = spread(self.counts)
        self._rank = _ranks(self._pattern)
        shards = [len(order.sizes) for order in orders]
        self._first_shard = [0, *accumulate(shards)][:-1]

    def __len__(self) -> int:
        """Samples in all sources."""
        return sum(map(len, self.orders))

    def at(self, position: int, skip: int = 0) -> Place:
        """The sample at a position, or `skip` samples further on in the order of its source."""
        window, slot = divmod(position, WINDOW)
        source = self._pattern[slot]
        sample = self.orders[source].at(window * self.counts[source] + self._rank[slot] + skip)
        return Place(source, sample.epoch, self._first_shard[source] + sample.shard, sample.index)

    def shards_ahead(self, position: int) -> list[int]:
        """The shards of all sources that are read around a position and next."""
        places = zip(self.orders, self._first_shard, self.source_positions(position), strict=True)
        return [first + shard for order, first, place in places for shard in order.nearby(place)]

    def source_positions(self, position: int) -> list[int]:
        """Samples of each source before a position."""
        window, slot = divmod(position, WINDOW)
        begun = self._pattern[:slot]
        return [window * count + begun.count(source) for source, count in enumerate(self.counts)]


def window_counts(weights: Sequence[float]) -> list[int]:
    """Places of each source among `WINDOW`, by the largest remainder.

    Raises:
        InputError: a source would get none.
    """
    exact = [WINDOW * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: WINDOW - sum(counts)]:
        counts[i] += 1
    for i, count in enumerate(counts):
        if not count:
            raise InputError(
                f"data.sources.{i}.weight: {weights[i]:g} of {sum(weights):g} is below a thousandth; raise it"
            )
    return counts


def spread(counts: Sequence[int]) -> list[int]:
    """The source of each place of a window, those of a source as evenly apart as they go."""
    places = [
        ((2 * k + 1) / (2 * count), source) for source, count in enumerate(counts) for k in range(count)
    ]
    return [source for _, source in sorted(places)]


def _ranks(pattern: Sequence[int]) -> list[int]:
    """For each place the earlier ones of the same source."""
    seen: dict[int, int] = {}
    ranks = []
    for source in pattern:
        ranks.append(seen.get(source, 0))
        seen[source] = ranks[-1] + 1
    return ranks
