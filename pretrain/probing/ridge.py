"""Ridge regression on one-hot targets as a classifier: every strength from one eigendecomposition.

With centred features X and targets Y, and X^T X = V diag(s) V^T: W = V diag(1 / (s + a)) V^T X^T Y. The
strength is the C of the logistic probes, C |Y - X W|^2 + 0.5 |W|^2, so that a = 1 / (2 C), which is
scikit-learn's alpha.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.probing.linear import LinearProbe
from pretrain.probing.preprocessing import Floats, Ints

RANK = 1e-12  # of the largest eigenvalue: below it is rounding


@dataclass(frozen=True)
class Spectrum:
    """Centred features in their principal axes, r of them."""

    mean: Floats  # (d,)
    axes: Floats  # (d, r) orthonormal
    values: Floats  # (r,) eigenvalues s of X^T X
    rotated: Floats  # (n, r) X V


def decompose(features: Floats) -> Spectrum:
    """One symmetric eigendecomposition, of X^T X or of X X^T, whichever is smaller; features (n, d)."""
    mean = features.mean(axis=0)
    centred = features - mean
    wide = len(centred) < centred.shape[1]
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    kept = values > RANK * max(values[-1], np.finfo(np.float64).tiny)
    values, vectors = values[kept], vectors[:, kept]
    axes = centred.T @ vectors / np.sqrt(values) if wide else vectors
    return Spectrum(mean, axes, values, centred @ axes)


def fit_ridge(
    features: Floats, targets: Ints, classes: Ints, strengths: Sequence[float]
) -> list[LinearProbe]:
    """Ridge classifiers, a probe per C.

    Args:
        features: (n, d).
        targets: (n,) places of the labels among the classes.
        classes: (K,) ascending.
        strengths: values of C.
    """
    spectrum, one_hot = decompose(features), np.eye(len(classes))[targets]
    share = one_hot.mean(axis=0)
    moments = spectrum.rotated.T @ (one_hot - share)  # (r, K)
    probes = []
    for strength in strengths:
        inner = moments / (spectrum.values + _alpha(strength))[:, None]
        weights = spectrum.axes @ inner
        errors = one_hot - share - spectrum.rotated @ inner
        objective = float(strength * (errors**2).sum() + 0.5 * (weights**2).sum())
        slope = (weights / strength - 2 * spectrum.axes @ (spectrum.rotated.T @ errors)) / len(features)
        gradient, intercepts = float(np.abs(slope).max()), share - spectrum.mean @ weights
        probes.append(
            LinearProbe(float(strength), classes, weights, intercepts, objective, gradient, 1, True)
        )
    return probes


def leave_one_out(features: Floats, targets: Ints, strengths: Sequence[float]) -> Ints:
    """What a ridge classifier fitted without an image says about it, for each image and C: (strengths, n).

    Exact, without a second fit: the error of such a prediction is e_i / (1 - h_i), with e_i the error of the
    whole fit and h_i = 1 / n + sum_j (X V)_ij^2 / (s_j + a) the image's weight in its own prediction.

    Args:
        features: (n, d).
        targets: (n,) places of the labels among the classes, from 0.
        strengths: values of C.
    """
    spectrum, one_hot = decompose(features), np.eye(int(targets.max()) + 1)[targets]
    share, predicted = one_hot.mean(axis=0), []
    moments = spectrum.rotated.T @ (one_hot - share)
    for strength in strengths:
        scaled = spectrum.rotated / (spectrum.values + _alpha(strength))
        errors = one_hot - share - scaled @ moments
        own = 1 / len(features) + (scaled * spectrum.rotated).sum(axis=1, keepdims=True)
        predicted.append((one_hot - errors / np.maximum(1 - own, 1e-12)).argmax(axis=1))
    return np.array(predicted, np.int64)


def best_by_leave_one_out(features: Floats, targets: Ints, strengths: Sequence[float]) -> tuple[float, float]:
    """The C with the most right predictions of images left out, the smallest of equals, and their percent."""
    ordered = sorted(strengths)
    right = 100 * (leave_one_out(features, targets, ordered) == targets).mean(axis=1)
    return float(ordered[int(right.argmax())]), float(right.max())


def _alpha(strength: float) -> float:
    return 1 / (2 * strength)
