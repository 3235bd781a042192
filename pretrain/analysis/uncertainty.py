"""How sure a mean over images is, and a mean difference between two conditions on the same images."""

from typing import NamedTuple

import numpy as np

from pretrain.seeding import numpy_stream

DRAWS = 10_000  # resamples of an interval, sign flips of a test
LEVEL = 0.95  # of intervals
CHUNK = 2**22  # numbers drawn at a time


class Interval(NamedTuple):
    """A mean, and the bootstrap's percentile interval of it."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Interval:
    """The mean of values (n,) with its interval: images are drawn again with replacement."""
    stream, number = numpy_stream(seed, "bootstrap"), len(values)
    rows = max(1, CHUNK // number)
    means = [
        values[stream.integers(number, size=(min(rows, draws - start), number))].mean(axis=1)
        for start in range(0, draws, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_permutation(differences: np.ndarray, seed: int = 0, draws: int = DRAWS) -> float:
    """Two-sided p-value that differences (n,) between two conditions are centred on 0, by random sign flips.

    The share of flips, the observed one counted in, whose sum is at least as far from 0 (Phipson and Smyth
    2010): it is never 0, and 1 where all differences are 0.
    """
    apart = differences[differences != 0]  # the others add nothing to any sum
    if not len(apart):
        return 1.0
    stream, observed, beyond = numpy_stream(seed, "sign flips"), abs(apart.sum()), 0
    rows = max(1, CHUNK // len(apart))
    for start in range(0, draws, rows):
        signs = 2 * stream.integers(2, size=(min(rows, draws - start), len(apart)), dtype=np.int8) - 1
        beyond += int((np.abs(signs @ apart) >= observed * (1 - 1e-12)).sum())
    return (1 + beyond) / (1 + draws)
