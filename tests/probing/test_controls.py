"""Projections are isometric on their subspace, PCA keeps the most variance, random features are a layer."""

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu

from pretrain.errors import InputError
from pretrain.probing import preprocessing
from pretrain.probing.controls import fit_pca, random_features, random_projection
from pretrain.probing.preprocessing import from_array
from tests.probing.problems import features


@pytest.mark.parametrize(("dim", "reduced"), [(256, 64), (32, 32), (8, 1)])
def test_a_random_projection_has_orthonormal_rows(dim: int, reduced: int) -> None:
    matrix = random_projection(dim, reduced, 0).matrix
    assert np.allclose(matrix @ matrix.T, np.eye(reduced), atol=1e-12)
    assert np.array_equal(matrix, random_projection(dim, reduced, 0).matrix)
    assert not np.allclose(matrix, random_projection(dim, reduced, 1).matrix)


def test_a_random_projection_keeps_distances_up_to_its_share() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 1024))
    projected = random_projection(1024, 256, 0).apply(rows)
    before, after = (np.linalg.norm(part[:25] - part[25:], axis=1) for part in (rows, projected))
    assert np.abs(after / before * 2 - 1).max() < 0.2
    whole = random_projection(1024, 1024, 0).apply(rows)
    assert np.allclose(np.linalg.norm(whole[:25] - whole[25:], axis=1), before)


def test_its_directions_are_drawn_from_all() -> None:
    """Without the signs of the triangle, the first row would always point the same way."""
    firsts = np.array([random_projection(4, 2, seed).matrix[0, 0] for seed in range(200)])
    assert abs(np.mean(firsts > 0) - 0.5) < 0.12


def test_pca_is_that_of_the_singular_values_of_training_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "BLOCK", 40 * 60)
    rows, _ = features(300, 40, 5, seed=0)
    train = from_array(rows, rows=np.arange(200))
    pca = fit_pca(train, 7)
    _, values, axes = np.linalg.svd(rows[:200] - rows[:200].mean(axis=0))
    assert np.allclose(np.abs((pca.matrix * axes[:7]).sum(axis=1)), 1)
    assert np.allclose(pca.matrix @ pca.matrix.T, np.eye(7), atol=1e-12)
    kept = pca.apply(rows[:200])
    assert np.allclose(kept.mean(axis=0), 0) and np.allclose((kept**2).sum(axis=0), values[:7] ** 2)
    assert (pca.matrix[np.arange(7), np.abs(pca.matrix).argmax(axis=1)] > 0).all()
    assert np.abs(pca.apply(rows[200:]).mean(axis=0)).max() > 1e-6


def test_random_features_are_a_layer_with_gelu() -> None:
    lift, rows = random_features(32, 128, 0), np.random.default_rng(0).standard_normal((500, 32))
    layer = [torch.from_numpy(part) for part in (rows, lift.weight, lift.bias)]
    assert np.allclose(lift.apply(rows), gelu(torch.nn.functional.linear(*layer)).numpy())
    assert np.var(rows @ lift.weight.T + lift.bias) == pytest.approx(2, rel=0.2)
    assert np.linalg.matrix_rank(lift.apply(rows)) == 128


def test_impossible_widths_are_one_line() -> None:
    rows, _ = features(20, 40, 5, seed=0)
    with pytest.raises(InputError, match="41 channels: a projection of 40 has 1 to 40"):
        random_projection(40, 41, 0)
    with pytest.raises(InputError, match="block01_Act: 20 images give 19 components, not 20"):
        fit_pca(from_array(rows, "block01_Act"), 20)
