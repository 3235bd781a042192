"""Intervals and p-values against theory and against all sign flips."""

from itertools import product

import numpy as np
import pytest

from pretrain.analysis.uncertainty import bootstrap, paired_permutation


def test_the_interval_is_that_of_the_standard_error():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    found = bootstrap(values)
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert bootstrap(values) == found != bootstrap(values, seed=1)
    assert bootstrap(np.full(5, 2.0)) == (2, 2, 2)


def test_p_values_are_those_of_all_sign_flips():
    apart = np.array([3.0, -1.0, 2.0, 4.0, -0.5, 1.0, 0.0, 2.5])
    sums = np.array([np.dot(signs, apart) for signs in product((-1, 1), repeat=8)])
    exact = (np.abs(sums) >= apart.sum() - 1e-12).mean()
    assert paired_permutation(apart) == pytest.approx(exact, abs=0.015)  # 3 deviations of 10,000 draws
    assert paired_permutation(-apart) == paired_permutation(apart)


def test_no_difference_has_p_1_and_a_sure_one_the_least():
    assert paired_permutation(np.zeros(30)) == 1
    assert paired_permutation(np.full(100, 100.0)) == pytest.approx(1 / 10_001)


def test_chance_alone_is_significant_as_often_as_it_says():
    drawn = np.random.default_rng(0).normal(size=(200, 25))
    values = [paired_permutation(row, draws=400) for row in drawn]
    assert 2 <= sum(p <= 0.05 for p in values) <= 20  # 10 of 200
