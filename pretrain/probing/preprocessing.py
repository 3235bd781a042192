"""Features as a probe sees them: read in blocks, rows of length 1, then standardised as in training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import InputError

Array = NDArray[np.floating[Any]]  # fp16, fp32 or fp64
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Step = Callable[[Floats], Floats]  # (b, d) to (b, d'), each row by itself
BLOCK = 2**21  # numbers read at a time: 16 MiB as float64
EPS = 1e-12  # length below which a row counts as dead and stays near 0


@dataclass(frozen=True)
class Features:
    """Features (n, d) of images at one place of a backbone, not read before they are needed."""

    name: str  # of the place, for messages
    load: Callable[[], Array]  # (N, D), such as a memory-mapped file; N is at least n
    rows: Ints | None = None  # (n,) of the loaded ones; None: all
    steps: tuple[Step, ...] = ()  # applied in this order: D to d channels

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows n and channels d after all steps."""
        array = self.load()
        number = len(array) if self.rows is None else len(self.rows)
        if number == 0:
            raise InputError(f"{self.name}: there is no image; give at least one")
        first = np.asarray(array[:1] if self.rows is None else array[self.rows[:1]], np.float64)
        return number, self._prepared(first).shape[1]

    def then(self, *steps: Step) -> "Features":
        """The same with further steps at the end."""
        return replace(self, steps=(*self.steps, *steps))

    def take(self, rows: Ints) -> "Features":
        """Some of the rows, by their numbers among all that can be loaded."""
        return replace(self, rows=rows)

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """Consecutive rows as (number of the first, (b, d)), float64.

        Raises:
            InputError: there is no row, or a number is not finite.
        """
        array, number = self.load(), self.shape[0]
        size = max(1, BLOCK // array.shape[1])
        for start in range(0, number, size):
            stop = min(start + size, number)
            chosen = slice(start, stop) if self.rows is None else self.rows[start:stop]
            yield start, self._prepared(np.asarray(array[chosen], np.float64))

    def _prepared(self, block: Floats) -> Floats:
        if not np.isfinite(block).all():
            raise InputError(f"{self.name}: the features hold NaN or infinity; extract them in fp32")
        for step in self.steps:
            block = step(block)
        return block

    def read(self) -> Floats:
        """All rows (n, d) float64."""
        found = np.empty(self.shape)
        for start, block in self.blocks():
            found[start : start + len(block)] = block
        return found

    def batches(self, size: int) -> Iterator[NDArray[np.float32]]:
        """Consecutive rows (b, d) in fp32, `size` of them at a time."""
        number, dim = self.shape
        rows = np.arange(number) if self.rows is None else self.rows
        for first in range(0, number, size):
            batch = np.empty((min(size, number - first), dim), np.float32)
            for start, block in self.take(rows[first : first + size]).blocks():
                batch[start : start + len(block)] = block
            yield batch


def from_array(array: Array, name: str = "features", rows: Ints | None = None) -> Features:
    """Features that are in memory or mapped into it, (N, D)."""
    return Features(name, lambda: array, rows)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to features before a probe, with the statistics of its training rows."""

    mean: Floats  # (d,)
    scale: Floats  # (d,) standard deviation; 1 where a channel is constant
    unit_length: bool = True  # rows are divided by their length first

    def apply(self, features: Floats) -> Floats:
        """(b, d) to a new (b, d)."""
        rows = unit_rows(features) if self.unit_length else features
        return np.asarray((rows - self.mean) / self.scale)


def unit_rows(features: Floats) -> Floats:
    """Rows divided by their L2 norm, (b, d) to a new (b, d); a row of zeros stays one."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), EPS)


def fit_preprocessing(train: Features, unit_length: bool = True) -> Preprocessing:
    """Statistics of training features alone, in two passes; as in the paper's `StandardScaler`.

    Args:
        train: before preprocessing.
        unit_length: divide each row by its length first, as the paper does.

    Raises:
        InputError: there is no row, or a number is not finite.
    """
    prepared = train.then(unit_rows) if unit_length else train
    number = prepared.shape[0]
    mean = column_sums(prepared) / number
    variance = column_sums(prepared.then(lambda block: (block - mean) ** 2)) / number
    eps = np.finfo(np.float64).eps  # a channel as even as rounding allows is constant (scikit-learn's bound)
    constant = variance <= number * eps * variance + (number * mean * eps) ** 2
    return Preprocessing(mean, np.where(constant, 1.0, np.sqrt(variance)), unit_length)


def prepare(train: Features, *others: Features, unit_length: bool = True) -> list[Features]:
    """Training features and others at the same place, all preprocessed by the statistics of the first."""
    fitted = fit_preprocessing(train, unit_length)
    return [features.then(fitted.apply) for features in (train, *others)]


def column_sums(features: Features) -> Floats:
    """Of all rows, (d,)."""
    found = np.zeros(features.shape[1])
    for _, block in features.blocks():
        found += block.sum(axis=0)
    return found
