"""Classification problems with the habits of frozen features: correlated channels, noisy labels."""

import numpy as np

from pretrain.probing.preprocessing import Features, Floats, Ints, from_array, prepare


def features(number: int, dim: int, classes: int, seed: int, place: int = 0) -> tuple[Floats, Ints]:
    """Rows (n, d) whose principal axes have variances 1, 1/2, ... 1/d, and labels (n,), some of them wrong.

    `seed` draws the images, `place` what a layer of a backbone makes of them.
    """
    images, layer = np.random.default_rng(seed), np.random.default_rng(1000 + place)
    labels = images.integers(classes, size=number)
    centres = layer.standard_normal((classes, dim))
    content = images.standard_normal((number, dim)) + 0.7 * centres[labels]
    mixing = np.linalg.qr(layer.standard_normal((dim, dim)))[0]
    wrong = images.random(number) < 0.1
    labels = np.where(wrong, images.integers(classes, size=number), labels)
    return (content / np.sqrt(np.arange(1, dim + 1))) @ mixing + 0.1, labels


def problem(
    number: int, dim: int, classes: int = 10, place: int = 0
) -> tuple[Features, Ints, Features, Ints]:
    """Preprocessed features and labels for training, and others for a test."""
    train, labels = features(number, dim, classes, seed=0, place=place)
    test, test_labels = features(1000, dim, classes, seed=1, place=place)
    fit_on, held_out = prepare(from_array(train, f"place{place}"), from_array(test))
    return fit_on, labels, held_out, test_labels
