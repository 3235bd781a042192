"""A fitted linear classifier, and what it says about images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.probing.preprocessing import Features, Floats, Ints


@dataclass(frozen=True)
class LinearProbe:
    """Scores x W + b of K classes, and how they were found."""

    strength: float  # C, weight of the loss against 0.5 |W|^2
    classes: Ints  # (K,) ascending
    weights: Floats  # (d, K)
    intercepts: Floats  # (K,)
    objective: float  # C * sum of losses + penalty
    gradient: float  # largest entry of the objective's gradient over C n, as scikit-learn's `tol`
    iterations: int
    converged: bool

    def scores(self, features: Floats) -> Floats:
        """(m, d) to (m, K)."""
        return features @ self.weights + self.intercepts


def predictions(probes: Sequence[LinearProbe], features: Features) -> Ints:
    """Predicted class of each image by each probe of one place, (probes, m); features are read once."""
    found = np.empty((len(probes), features.shape[0]), np.int64)
    for start, block in features.blocks():
        for row, probe in zip(found, probes, strict=True):
            row[start : start + len(block)] = probe.classes[probe.scores(block).argmax(axis=1)]
    return found


def accuracies(probes: Sequence[LinearProbe], features: Features, labels: Ints) -> list[float]:
    """Percent of images that each probe classifies rightly."""
    return [100 * float(np.mean(row == labels)) for row in predictions(probes, features)]
