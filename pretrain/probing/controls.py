"""Features of another width with the same content: is a wide place better because it is wide?

The hidden layers of the feed-forward part have more channels than all other places: 4 D by default. A random
projection and the leading principal components bring them to D, random features a block's output to theirs.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.special import ndtr

from pretrain.errors import InputError
from pretrain.probing.preprocessing import Features, Floats, column_sums
from pretrain.seeding import numpy_stream


@dataclass(frozen=True)
class Projection:
    """(x - mean) P^T, with orthonormal rows of P."""

    mean: Floats  # (d,)
    matrix: Floats  # (d', d)

    def apply(self, features: Floats) -> Floats:
        """(b, d) to (b, d')."""
        return (features - self.mean) @ self.matrix.T


@dataclass(frozen=True)
class RandomFeatures:
    """GELU(W x + b) of a layer that was never trained."""

    weight: Floats  # (d', d)
    bias: Floats  # (d',)

    def apply(self, features: Floats) -> Floats:
        """(b, d) to (b, d')."""
        hidden = features @ self.weight.T + self.bias
        return np.asarray(hidden * ndtr(hidden))


def random_projection(dim: int, reduced: int, seed: int) -> Projection:
    """On a subspace drawn uniformly, d = `dim` to d' = `reduced` channels, without a shift.

    Raises:
        InputError: d' is not 1 to d.
    """
    _check(dim, reduced)
    drawn = numpy_stream(seed, "random-projection", dim, reduced).standard_normal((dim, reduced))
    axes, triangle = np.linalg.qr(drawn)
    return Projection(np.zeros(dim), (axes * np.sign(np.diag(triangle))).T)  # signs make it uniform


def fit_pca(train: Features, reduced: int) -> Projection:
    """On the leading principal components of training features, in two passes over them.

    The sign of a component is that which makes its largest entry positive.

    Raises:
        InputError: d' is not 1 to d, or there are not more images than d'.
    """
    number, dim = train.shape
    _check(dim, reduced)
    if number <= reduced:
        raise InputError(
            f"{train.name}: {number} images give {number - 1} components, not {reduced}; give more"
        )
    mean = column_sums(train) / number
    covariance = np.zeros((dim, dim))
    for _, block in train.blocks():
        covariance += (block - mean).T @ (block - mean)
    components = eigh(covariance, subset_by_index=(dim - reduced, dim - 1))[1].T[::-1]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return Projection(mean, components * np.sign(largest))


def random_features(dim: int, lifted: int, seed: int) -> RandomFeatures:
    """A layer d = `dim` to d' = `lifted` with weights N(0, 1 / d) and biases N(0, 1).

    Its input should be standardised: then the hidden units' inputs have a variance of about 2.
    """
    stream = numpy_stream(seed, "random-features", dim, lifted)
    return RandomFeatures(
        stream.standard_normal((lifted, dim)) / np.sqrt(dim), stream.standard_normal(lifted)
    )


def _check(dim: int, reduced: int) -> None:
    if not 1 <= reduced <= dim:
        raise InputError(f"{reduced} channels: a projection of {dim} has 1 to {dim}")
