"""How sure a mean of per-image scores is, and whether one model is better than another on the same images."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import InputError
from pretrain.seeding import numpy_stream

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.95  # of intervals
RESAMPLES = 10_000
PERMUTATIONS = 10_000  # as in arXiv 2604.14433
DISTINCT = 64  # kinds of images up to which resamples are drawn as counts
CHUNK = 2**22  # numbers drawn at a time: 32 MiB


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile bootstrap interval, in the unit of the scores."""

    mean: float
    low: float
    high: float


def bootstrap(
    scores: Floats,
    seed: int,
    groups: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile bootstrap of the mean of scores, such as 0 and 1 for an accuracy.

    For a paired difference, give the differences of two probes' scores on the same images.

    Args:
        scores: (n,) of each image.
        seed: of the resamples.
        groups: (n,) of each image: whole groups are drawn, as images of one patient are not independent.
        level: share of the resamples' means inside.
        resamples: how many.

    Raises:
        InputError: there is no score, or not one for each group's image.
    """
    units = _units(scores, groups)
    sums = _resampled(units, numpy_stream(seed, "bootstrap"), resamples)
    tail = 50 * (1 - level)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [tail, 100 - tail])
    return Interval(float(np.mean(scores)), float(low), float(high))


def bootstrap_difference(
    left: Floats, right: Floats, seed: int, groups: Sequence[Hashable] | None = None, level: float = LEVEL
) -> Interval:
    """Of the mean of left - right, two probes' scores (n,) on the same images; see `bootstrap`."""
    return bootstrap(_differences(left, right), seed, groups, level)


def bootstrap_statistic(
    statistic: Callable[[Ints], float], number: int, seed: int, level: float = LEVEL, resamples: int = 1_000
) -> tuple[float, float]:
    """Percentile bootstrap of what is no mean over images, such as the mIoU of all their pixels.

    Args:
        statistic: of the images at some rows (n,), repeated where they are drawn again.
        number: of images n.
        seed: of the resamples.
        level: share of the resamples inside.
        resamples: how many.
    """
    stream, tail = numpy_stream(seed, "bootstrap-statistic"), 50 * (1 - level)
    drawn = [statistic(stream.integers(number, size=number)) for _ in range(resamples)]
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def permutation_test(left: Floats, right: Floats, seed: int, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p that paired scores (n,) have one mean: signs of their differences are flipped at random.

    Exact where all sign patterns are no more than `permutations`; otherwise (1 + as extreme) / (1 + drawn),
    which is never 0. Equal pairs play no part.

    Args:
        left: of images; of groups, such as means of patients, where images of a group are not independent.
        right: likewise.
        seed: of the flips.
        permutations: how many.

    Raises:
        InputError: the numbers of scores differ, or there is none.
    """
    differences = _differences(left, right)
    sizes = np.abs(differences[differences != 0])
    observed = abs(differences.sum()) - 1e-12 * sizes.sum()  # sums in another order differ by rounding
    if 2 ** len(sizes) <= permutations:
        signs = 1 - 2 * ((np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes))) & 1)
        return float(np.mean(np.abs(signs @ sizes) >= observed))
    generator, extreme = numpy_stream(seed, "permutation"), 0
    kinds, counts = np.unique(sizes, return_counts=True)
    single = counts.max() == 1  # the same draws, ten times as fast
    for size in _sizes(permutations, len(kinds)):
        shape = (size, len(kinds))
        flipped = generator.integers(2, size=shape) if single else generator.binomial(counts, 0.5, size=shape)
        extreme += int((np.abs((2 * flipped - counts) @ kinds) >= observed).sum())
    return (1 + extreme) / (1 + permutations)


def _units(scores: Floats, groups: Sequence[Hashable] | None) -> Floats:
    """What is drawn: for each image or group the sum of its scores and its number of images, (units, 2)."""
    values = np.asarray(scores, np.float64)
    if len(values) == 0:
        raise InputError("scores: there is no image; give at least one")
    if groups is None:
        return np.stack([values, np.ones_like(values)], axis=1)
    if len(groups) != len(values):
        raise InputError(f"scores: {len(values)} images for {len(groups)} groups; give each image one")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    members = np.array([numbers[name] for name in groups])
    return np.stack([np.bincount(members, values), np.bincount(members)], axis=1).astype(np.float64)


def _resampled(units: Floats, generator: np.random.Generator, resamples: int) -> Floats:
    """Sums (resamples, 2) over as many units, drawn with replacement from (units, 2)."""
    kinds, counts = np.unique(units, axis=0, return_counts=True)
    if len(kinds) <= DISTINCT:  # how often each kind is drawn has a distribution with a name
        return np.asarray(generator.multinomial(len(units), counts / len(units), size=resamples) @ kinds)
    sums = []
    for size in _sizes(resamples, len(units)):
        drawn = generator.integers(len(units), size=(size, len(units)))
        sums.append(np.stack([column[drawn].sum(axis=1) for column in units.T], axis=1))
    return np.concatenate(sums)


def _differences(left: Floats, right: Floats) -> Floats:
    first, second = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if first.shape != second.shape or not len(first):
        raise InputError(f"scores: {len(first)} and {len(second)}; give both for the same images")
    return first - second


def _sizes(number: int, width: int) -> list[int]:
    """Rows of each chunk of `number` rows of `width` numbers."""
    size = max(1, CHUNK // width)
    return [min(size, number - start) for start in range(0, number, size)]
