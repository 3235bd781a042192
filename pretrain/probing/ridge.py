"""Ridge regression on one-hot targets as a classifier: every strength from one eigendecomposition.

With centred features X and targets Y, and X^T X = V diag(s) V^T: W = V diag(1 / (s + a)) V^T X^T Y. The
strength is the C of the logistic probes, C |Y - X W|^2 + 0.5 |W|^2, so that a = 1 / (2 C), which is
scikit-learn's alpha.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.probing.linear import LinearProbe
from pretrain.probing.preprocessing import Features, Floats, Ints, column_sums

RANK = 1e-12  # of the largest eigenvalue: below it is rounding


@dataclass(frozen=True)
class Spectrum:
    """Centred features in their principal axes, r of them."""

    axes: Floats  # (d, r) orthonormal
    values: Floats  # (r,) eigenvalues s of X^T X


@dataclass(frozen=True)
class Moments:
    """Sums over images: all that a ridge classifier depends on."""

    mean: Floats  # (d,) of the features
    share: Floats  # (K,) of the images that are of a class: the mean of Y
    gram: Floats  # (d, d) X^T X
    cross: Floats  # (d, K) X^T Y
    squares: float  # |Y|^2


def decompose(features: Floats) -> Spectrum:
    """One symmetric eigendecomposition, of X^T X or of X X^T, whichever is smaller; features (n, d)."""
    centred = features - features.mean(axis=0)
    wide = len(centred) < centred.shape[1]
    values, vectors = _eigen(centred @ centred.T if wide else centred.T @ centred)
    axes = centred.T @ vectors / np.sqrt(values) if wide else vectors
    return Spectrum(axes, values)


def sum_up(features: Features, targets: Ints, classes: int) -> Moments:
    """Moments of features (n, d), read in blocks, and of one-hot targets of K = `classes`."""
    number, dim = features.shape
    mean, share = column_sums(features) / number, np.bincount(targets, minlength=classes) / number
    identity = np.eye(classes)
    gram, cross, squares = np.zeros((dim, dim)), np.zeros((dim, classes)), 0.0
    for start, block in features.blocks():
        centred = block - mean
        one_hot = identity[targets[start : start + len(block)]] - share
        gram += centred.T @ centred
        cross += centred.T @ one_hot
        squares += float((one_hot**2).sum())
    return Moments(mean, share, gram, cross, squares)


def fit_ridge(
    features: Features, targets: Ints, classes: Ints, strengths: Sequence[float]
) -> list[LinearProbe]:
    """Ridge classifiers, a probe per C.

    Args:
        features: (n, d); held in memory are d x d sums, not n rows.
        targets: (n,) places of the labels among the classes.
        classes: (K,) ascending.
        strengths: values of C.
    """
    sums, number = sum_up(features, targets, len(classes)), features.shape[0]
    if number < features.shape[1]:  # X X^T is the smaller one, and n rows are less than d x d
        spectrum = decompose(features.read())
        values, axes = spectrum.values, spectrum.axes
    else:
        values, axes = _eigen(sums.gram)
    rotated = axes.T @ sums.cross  # (r, K)
    probes = []
    for strength in strengths:
        inner = rotated / (values + _alpha(strength))[:, None]
        weights = axes @ inner
        errors = sums.squares + float((inner * (values[:, None] * inner - 2 * rotated)).sum())
        objective = float(strength * errors + 0.5 * (weights**2).sum())
        slope = (weights / strength - 2 * (sums.cross - sums.gram @ weights)) / number
        gradient, intercepts = float(np.abs(slope).max()), sums.share - sums.mean @ weights
        probes.append(
            LinearProbe(float(strength), classes, weights, intercepts, objective, gradient, 1, True)
        )
    return probes


def _eigen(matrix: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues (r,) and eigenvectors (m, r) of a symmetric (m, m), without those that are rounding."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > RANK * max(values[-1], np.finfo(np.float64).tiny)
    return values[kept], vectors[:, kept]


def _alpha(strength: float) -> float:
    return 1 / (2 * strength)
