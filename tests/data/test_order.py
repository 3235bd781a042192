import math
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Order, Permutation
from pretrain.seeding import stream_key

SIZES = [5, 0, 7, 1, 20, 3, 9]


@pytest.mark.parametrize("key", [0, 1, 2**128 - 1])
def test_permutation_is_a_bijection(key: int) -> None:
    for size in [*range(1, 130), 1000, 1024, 4999]:
        permutation = Permutation(size, key)
        assert sorted(permutation(i) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [10**6, 10**9 + 7, 2**40])
def test_large_permutations_stay_in_range_and_apart(size: int) -> None:
    permutation = Permutation(size, 1)
    images = {permutation(place) for place in [*range(500), *range(size - 500, size)]}
    assert len(images) == 1000
    assert 0 <= min(images) < size / 50 and size * 0.98 < max(images) < size


def chi_square(counts: Counter, cells: int) -> float:
    """In standard deviations from what uniform counts give."""
    expected = counts.total() / cells
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    statistic += (cells - len(counts)) * expected
    return (statistic - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_all_orders_of_few_elements_are_equally_likely() -> None:
    for size in (2, 3, 4, 5):
        permutations = (Permutation(size, stream_key(seed, "test")) for seed in range(3000))
        counts = Counter(tuple(map(permutation, range(size))) for permutation in permutations)
        assert chi_square(counts, math.factorial(size)) < 4


@pytest.mark.parametrize("place", [0, 1, 56])
def test_an_element_moves_to_every_place_equally_often(place: int) -> None:
    counts = Counter(Permutation(57, stream_key(seed, "test"))(place) for seed in range(6000))
    assert chi_square(counts, 57) < 4


def test_neighbours_do_not_stay_neighbours() -> None:
    permutation = Permutation(10_000, 3)
    adjacent = sum(abs(permutation(i + 1) - permutation(i)) == 1 for i in range(9_999))
    assert adjacent < 15  # 2 are expected


@pytest.mark.parametrize("shuffle", ["none", "full", "block"])
@pytest.mark.parametrize("open_shards", [1, 3, 100])
def test_every_sample_once_an_epoch(shuffle: str, open_shards: int) -> None:
    order = Order(SIZES, 0, shuffle, open_shards)
    expected = [(shard, i) for shard, size in enumerate(SIZES) for i in range(size)]
    for epoch in range(3):
        samples = [order.at(epoch * len(order) + i) for i in range(len(order))]
        assert {sample.epoch for sample in samples} == {epoch}
        assert sorted((sample.shard, sample.index) for sample in samples) == expected


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.sampled_from(["none", "full", "block"]),
    open_shards=st.integers(1, 10),
    split=st.integers(1, 7),
    epoch=st.integers(0, 10**6),
)
def test_any_split_reads_each_sample_of_any_data_once(
    sizes, seed, shuffle, open_shards, split, epoch
) -> None:
    def order() -> Order:
        return Order(sizes, seed, shuffle, open_shards)

    whole = order()
    places = range(epoch * len(whole), (epoch + 1) * len(whole))
    samples = [whole.at(position) for position in places]
    assert {(s.shard, s.index) for s in samples} == {
        (shard, index) for shard, size in enumerate(sizes) for index in range(size)
    }
    assert len(samples) == len(whole) and {s.epoch for s in samples} == {epoch}
    readers = [order() for _ in range(split)]  # as ranks and workers: each has an order of its own
    assert [readers[i % split].at(position) for i, position in enumerate(places)] == samples


def test_none_is_sequential_and_the_others_are_not() -> None:
    stored = [(shard, i) for shard, size in enumerate(SIZES) for i in range(size)]

    def read(shuffle: str, seed: int = 0, start: int = 0) -> list[tuple[int, int]]:
        order = Order(SIZES, seed, shuffle, 2)
        return [(s.shard, s.index) for s in (order.at(start + i) for i in range(len(order)))]

    assert read("none") == stored
    for shuffle in ("full", "block"):
        assert read(shuffle) != stored
        assert read(shuffle) == read(shuffle)
        assert read(shuffle) != read(shuffle, seed=1)
        assert read(shuffle) != read(shuffle, start=len(stored))  # the next epoch


def test_block_mixes_only_its_shards() -> None:
    sizes = [10] * 12
    order = Order(sizes, 0, "block", 3)
    blocks = [{order.at(start + i).shard for i in range(30)} for start in range(0, 120, 30)]
    assert [len(block) for block in blocks] == [3, 3, 3, 3]
    assert set().union(*blocks) == set(range(12))
    assert blocks != [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 10, 11}]
    first = [order.at(i).shard for i in range(30)]
    assert sum(a != b for a, b in pairwise(first)) > 10  # mixed, not one after another


def test_any_position_in_any_order_gives_the_same_sample() -> None:
    forward, backward = Order(SIZES, 0, "block", 2), Order(SIZES, 0, "block", 2)
    positions = range(3 * sum(SIZES))
    found = {position: backward.at(position) for position in reversed(positions)}
    assert [forward.at(position) for position in positions] == [found[position] for position in positions]


def test_a_billion_samples_start_at_once() -> None:
    start = time.process_time()
    order = Order([100_000] * 10_000, 0, "block", 16)
    order.at(5)
    assert time.process_time() - start < 2
    start = time.process_time()
    for i in range(200):
        order.at(123_456_789 + 4_999 * i)
    assert (time.process_time() - start) / 200 < 1e-3


def test_no_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sample"):
        Order([0, 0], 0, "full", 1)


@pytest.mark.parametrize("module", ["pretrain.data.shards", "pretrain.data.index", "pretrain.data.order"])
def test_imports_no_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
