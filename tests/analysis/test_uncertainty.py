"""Intervals hold the truth as often as they say, tests are right under the null and see what is there."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from pretrain.analysis import uncertainty
from pretrain.analysis.uncertainty import (
    bootstrap,
    bootstrap_difference,
    bootstrap_statistic,
    permutation_test,
)
from pretrain.errors import InputError


def normal(number: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(number)


@pytest.mark.parametrize("kind", ["accuracy", "score"])
def test_it_covers_the_truth_as_often_as_it_says(kind: str) -> None:
    covered = 0
    for seed in range(200):
        drawn = normal(100, seed)
        scores, truth = (drawn, 0.0) if kind == "score" else ((drawn > 0.3).astype(float), 0.382089)
        found = bootstrap(scores, seed, resamples=400)
        assert found.low <= found.mean <= found.high
        covered += found.low <= truth <= found.high
    assert 0.90 < covered / 200 < 0.99


def test_drawing_counts_of_kinds_is_drawing_images(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = (normal(400, 0) > 0).astype(float)
    groups = (np.arange(400) // 4).tolist()
    by_counts, by_counts_of_groups = bootstrap(scores, 0), bootstrap(scores, 0, groups)
    monkeypatch.setattr(uncertainty, "DISTINCT", 0)
    monkeypatch.setattr(uncertainty, "CHUNK", 100_000)
    for counted, drawn in (
        (by_counts, bootstrap(scores, 0)),
        (by_counts_of_groups, bootstrap(scores, 0, groups)),
    ):
        assert (counted.low, counted.high) == pytest.approx((drawn.low, drawn.high), abs=0.006)
    error = 1.96 * scores.std() / 20
    assert (by_counts.low, by_counts.high) == pytest.approx(
        (scores.mean() - error, scores.mean() + error), abs=0.006
    )


def test_images_of_one_patient_are_not_independent() -> None:
    patients = normal(30, 0)
    scores = np.repeat(patients, 20) + 0.1 * normal(600, 1)
    groups = np.repeat(np.arange(30), 20).tolist()
    alone, grouped = bootstrap(scores, 0), bootstrap(scores, 0, groups)
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    assert grouped.mean == pytest.approx(alone.mean)


def test_the_interval_is_a_function_of_the_seed_and_narrows_with_the_level() -> None:
    scores = normal(100, 0)
    assert bootstrap(scores, 0) == bootstrap(scores, 0) != bootstrap(scores, 1)
    wide, narrow = bootstrap(scores, 0), bootstrap(scores, 0, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairs_tell_more_than_two_means() -> None:
    hard = normal(200, 0)
    left, right = hard + 0.1 + 0.2 * normal(200, 1), hard + 0.2 * normal(200, 2)
    found = bootstrap_difference(left, right, 0)
    assert 0 < found.low < 0.1 < found.high
    assert bootstrap(left, 0).low < bootstrap(right, 0).high


def test_p_is_uniform_under_the_null_and_small_under_a_shift() -> None:
    null = [permutation_test(normal(60, seed), np.zeros(60), seed, 400) for seed in range(300)]
    assert np.mean(np.array(null) < 0.05) < 0.1 and 0.42 < np.mean(null) < 0.58
    assert permutation_test(normal(60, 0) + 1, np.zeros(60), 0) == pytest.approx(1 / 10_001)


def test_few_pairs_are_counted_out() -> None:
    left = np.array([0.3, 0.5, 0.1, 0.9, 0.2, 0.0])
    right = np.array([0.1, 0.6, 0.0, 0.2, 0.1, 0.0])
    sums = [abs(np.dot(signs, left - right)) for signs in product((-1, 1), repeat=5 + 1)]
    expected = np.mean(np.array(sums) >= abs((left - right).sum()) - 1e-12)
    assert permutation_test(left, right, 0) == expected == permutation_test(right, left, 1)
    assert permutation_test(left, left, 0) == 1


def test_right_and_wrong_answers_give_mcnemars_exact_test() -> None:
    left = np.array([1.0] * 40 + [0] * 22 + [1] * 300)
    right = np.array([0.0] * 40 + [1] * 22 + [1] * 300)
    exact = 2 * binom.sf(39, 62, 0.5)
    assert permutation_test(left, right, 0) == pytest.approx(exact, abs=0.005)


def test_scores_that_do_not_pair_are_one_line() -> None:
    with pytest.raises(InputError, match="3 and 2; give both for the same images"):
        permutation_test(np.ones(3), np.ones(2), 0)
    with pytest.raises(InputError, match="there is no image"):
        bootstrap(np.ones(0), 0)
    with pytest.raises(InputError, match="3 images for 2 groups"):
        bootstrap(np.ones(3), 0, ["a", "b"])


def test_a_statistic_of_rows_has_the_interval_of_its_mean():
    values = np.random.default_rng(0).random(50)
    ends = bootstrap_statistic(lambda rows: float(values[rows].mean()), 50, seed=0, resamples=4000)
    found = bootstrap(values, seed=1)
    assert ends == pytest.approx((found.low, found.high), abs=0.01)
    low, high = bootstrap_statistic(lambda rows: float(values[rows].max()), 50, seed=0)
    assert low > 0.9 and high == values.max()
