import pytest

from pretrain.data.mixture import WINDOW, Mixture, spread, window_counts
from pretrain.data.order import Order


def test_every_window_holds_the_shares_exactly() -> None:
    mixture = Mixture([Order([50], 0, "full", 1, i) for i in range(3)], [7, 2, 1])
    sources = [mixture.at(position).source for position in range(3 * WINDOW)]
    for start in range(2 * WINDOW):
        window = sources[start : start + WINDOW]
        assert [window.count(source) for source in range(3)] == [700, 200, 100]


def test_shares_are_spread_evenly() -> None:
    pattern = spread([700, 300])
    for start in range(len(pattern) - 10):
        assert 2 <= pattern[start : start + 10].count(1) <= 4


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1], [1000]), ([1, 1, 1], [334, 333, 333]), ([0.7, 0.3], [700, 300]), ([999, 1], [999, 1])],
)
def test_counts(weights: list[float], counts: list[int]) -> None:
    assert window_counts(weights) == counts


def test_a_share_below_a_thousandth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.sources.1.weight: 1 of 3001 is below a thousandth"):
        window_counts([3000, 1])


def test_each_source_runs_through_its_own_epochs() -> None:
    sizes = ([4, 0, 6], [3, 2])
    mixture = Mixture([Order(size, 5, "block", 2, i) for i, size in enumerate(sizes)], [0.6, 0.4])
    read: dict[int, list[tuple[int, int, int]]] = {0: [], 1: []}
    for position in range(100):
        assert mixture.source_positions(position) == [len(read[0]), len(read[1])]
        place = mixture.at(position)
        read[place.source].append((place.epoch, place.shard, place.index))
    for source, shards in ((0, {0: 4, 2: 6}), (1, {3: 3, 4: 2})):
        samples = sorted((shard, i) for shard, size in shards.items() for i in range(size))
        for epoch in range(100 * (6, 4)[source] // 10 // len(samples)):
            part = read[source][epoch * len(samples) : (epoch + 1) * len(samples)]
            assert {e for e, _, _ in part} == {epoch}
            assert sorted((shard, i) for _, shard, i in part) == samples


def test_sources_of_one_size_are_not_in_step() -> None:
    mixture = Mixture([Order([40], 0, "full", 1, i) for i in range(2)], [1, 1])
    pairs = [(mixture.at(i).index, mixture.at(i + 1).index) for i in range(0, 80, 2)]
    assert sum(a == b for a, b in pairs) < 8


def test_skipping_goes_on_in_the_same_source() -> None:
    mixture = Mixture([Order([10], 0, "full", 1), Order([10], 0, "full", 1, 1)], [1, 1])
    assert mixture.at(0, skip=1) == mixture.at(2) and mixture.at(1, skip=3) == mixture.at(7)


def test_one_source_is_its_order() -> None:
    order = Order([5, 7], 3, "full", 1)
    mixture = Mixture([order], [0.3])
    for position in (0, 11, 12, 999, 1000, 123_456_789):
        place, sample = mixture.at(position), order.at(position)
        assert (place.epoch, place.shard, place.index) == (sample.epoch, sample.shard, sample.index)
