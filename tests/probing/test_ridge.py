"""Ridge classifiers against scikit-learn and the normal equations."""

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from pretrain.probing.linear import predictions
from pretrain.probing.preprocessing import from_array
from pretrain.probing.ridge import decompose
from pretrain.probing.solvers import Solver, fit_probes
from tests.probing.problems import problem

WIDE, TALL = (60, 90), (400, 40)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_it_solves_the_normal_equations_and_predicts_as_scikit_learn(shape) -> None:
    train, labels, test, _ = problem(*shape, 4)
    rows = train.read() + 3.0  # not centred
    ((_, path),) = fit_probes([from_array(rows)], labels, [1e-3, 1.0, 1e3], Solver("ridge"))
    centred, one_hot = rows - rows.mean(axis=0), np.eye(4)[labels]
    for probe in path:
        alpha = 1 / (2 * probe.strength)
        direct = np.linalg.solve(centred.T @ centred + alpha * np.eye(shape[1]), centred.T @ one_hot)
        assert np.allclose(probe.weights, direct, atol=1e-8) and probe.gradient < 1e-10
        assert np.allclose(probe.intercepts, (one_hot - rows @ direct).mean(axis=0))
        moved = from_array(test.read() + 3.0)
        reference = RidgeClassifier(alpha=alpha).fit(rows, labels)
        assert np.array_equal(predictions([probe], moved)[0], reference.predict(moved.read()))


def test_directions_without_variance_are_left_out() -> None:
    rows = np.random.default_rng(0).standard_normal((30, 5))
    spectrum = decompose(np.hstack([rows, rows, np.ones((30, 2))]))
    assert spectrum.values.shape == (5,) and spectrum.axes.shape == (12, 5)
    assert np.allclose(spectrum.axes.T @ spectrum.axes, np.eye(5))
