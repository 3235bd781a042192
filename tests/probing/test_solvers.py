"""The batched solver against scikit-learn, a batch against its probes alone, a path against cold starts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pretrain.errors import InputError
from pretrain.probing.linear import LinearProbe, accuracies, predictions
from pretrain.probing.logistic import PATIENCE
from pretrain.probing.preprocessing import Features, Ints, from_array
from pretrain.probing.solvers import STRENGTHS, Solver, fit_probes, logistic_objective, needed_memory
from tests.probing.problems import problem

SKLEARN = Solver("sklearn", gradient=1e-8)  # its default leaves 1e-4 of the objective at a large C
EXACT = Solver(dtype=torch.float64, gap=1e-13)


def fitted(places: list[Features], labels: Ints, strengths, solver: Solver) -> list[list[LinearProbe]]:
    found = dict(fit_probes(places, labels, strengths, solver))
    return [found[index] for index in range(len(places))]


def flat(probe: LinearProbe) -> np.ndarray:
    return np.append(probe.weights, probe.intercepts[None], axis=0)


@pytest.mark.parametrize(("number", "dim", "classes"), [(1500, 48, 10), (300, 64, 10), (600, 32, 2)])
def test_it_finds_scikit_learns_minimum(number: int, dim: int, classes: int) -> None:
    """Also where the images are separable: 300 of them, 10 classes, 64 channels."""
    train, labels, test, test_labels = problem(number, dim, classes)
    (ours,) = fitted([train], labels, STRENGTHS, Solver())
    (theirs,) = fitted([train], labels, STRENGTHS, SKLEARN)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.converged and reference.converged
        assert mine.objective == pytest.approx(reference.objective, rel=1e-5)
        read = logistic_objective(train.read(), labels, mine.weights, mine.intercepts, mine.strength)
        assert mine.objective == pytest.approx(read[0], rel=5e-6)
        assert mine.gradient == pytest.approx(read[1], abs=1e-7) and mine.gradient < 1e-3
    of_ours, of_theirs = (accuracies(path, test, test_labels) for path in (ours, theirs))
    assert of_ours == pytest.approx(of_theirs, abs=0.1 + 1e-9)
    assert max(of_ours) > 150 / classes


def test_fp64_reaches_the_minimum_of_newtons_method() -> None:
    train, labels, _, _ = problem(400, 24, 5)
    (path,) = fitted([train], labels, [0.1, 10], EXACT)
    for probe in path:
        model = LogisticRegression(C=probe.strength, solver="newton-cholesky", tol=1e-12)
        model.fit(train.read(), labels)
        assert np.allclose(probe.weights.T, model.coef_, atol=1e-5)
        assert np.allclose(probe.intercepts, model.intercept_, atol=1e-5)
        assert probe.gradient < 1e-7 and probe.converged


@pytest.mark.parametrize("solver", [Solver(), EXACT])
def test_a_probe_alone_is_that_of_a_batch_and_a_chunk(solver: Solver) -> None:
    """Five places of two widths, each with its own number of steps; also in the chunks of a small budget."""
    problems = [problem(300, dim, 5, place) for place, dim in enumerate((12, 20, 12, 12, 12))]
    places, labels = [train for train, *_ in problems], problems[0][1]
    batch = fitted(places, labels, [0.1, 10], solver)
    probe, once = needed_memory(places[1], 5, solver)
    chunked = fitted(places, labels, [0.1, 10], replace(solver, budget=once + probe))
    assert len({path[0].iterations for path in batch}) > 1
    for index, place in enumerate(places):
        (alone,) = fitted([place], labels, [0.1, 10], solver)
        for mine, others in zip(alone, zip(batch[index], chunked[index], strict=True), strict=True):
            for other in others:
                assert mine.objective == pytest.approx(other.objective, rel=10 * solver.gap + 1e-12)
                apart = np.abs(flat(mine) - flat(other)).max() / np.abs(flat(mine)).max()
                assert apart < 100 * solver.gap**0.5  # the objective is flat at its minimum
        assert (predictions(alone, place) == predictions(batch[index], place)).mean() > 0.99


def test_a_path_ends_where_cold_starts_do_and_comes_in_the_asked_order() -> None:
    train, labels, _, _ = problem(600, 32)
    (path,) = fitted([train], labels, [10, 0.001, 0.1], EXACT)
    assert [probe.strength for probe in path] == [10, 0.001, 0.1]
    for probe in path:
        ((cold,),) = fitted([train], labels, [probe.strength], EXACT)
        assert np.allclose(flat(cold), flat(probe), atol=1e-4)
    (warm,) = fitted([train], labels, STRENGTHS, Solver())
    cold_steps = [fitted([train], labels, [strength], Solver())[0][0].iterations for strength in STRENGTHS]
    assert sum(probe.iterations for probe in warm) < sum(cold_steps)


def test_classes_need_not_count_from_zero_nor_be_balanced() -> None:
    train, labels, test, test_labels = problem(400, 16, 3)
    names = np.array([-4, 7, 1000])
    rare = np.flatnonzero((labels != 2) | (np.cumsum(labels == 2) <= 3))
    (plain,), (named,) = (
        fitted([train.take(rare)], chosen[rare], [1.0], Solver()) for chosen in (labels, names[labels])
    )
    assert np.array_equal(names[predictions(plain, test)], predictions(named, test))
    assert accuracies(plain, test, test_labels) == accuracies(named, test, names[test_labels])


def test_a_probe_that_runs_out_of_steps_says_so() -> None:
    train, labels, _, _ = problem(400, 16, 3)
    for solver in (Solver(max_iterations=2), Solver("sklearn", max_iterations=2)):
        (path,) = fitted([train], labels, [0.1, 1.0], solver)
        assert [probe.converged for probe in path] == [False, False]
        assert [probe.iterations for probe in path] == [2, 2]


def test_a_precision_that_cannot_be_reached_ends() -> None:
    train, labels, _, _ = problem(300, 16, 3)
    ((probe,),) = fitted([train], labels, [1.0], Solver(gap=1e-30))
    assert not probe.converged and probe.iterations < 2 * PATIENCE
    ((exact,),) = fitted([train], labels, [1.0], EXACT)
    assert probe.objective == pytest.approx(exact.objective, rel=1e-6)


def test_channels_that_are_constant_or_copies_are_no_obstacle() -> None:
    train, labels, _, _ = problem(300, 16, 3)
    rows = train.read()
    rows = np.concatenate([rows, rows[:, :8], np.zeros((300, 4))], axis=1)
    ((mine,),), ((reference,),) = (
        fitted([from_array(rows)], labels, [100.0], solver) for solver in (Solver(), SKLEARN)
    )
    assert mine.objective == pytest.approx(reference.objective, rel=1e-5)
    assert np.abs(mine.weights[-4:]).max() < 1e-6


@pytest.mark.parametrize(
    ("labels", "strengths", "solver", "message"),
    [
        (np.zeros(300, np.int64), [1.0], Solver(), "show one class"),
        (np.arange(299) % 3, [1.0], Solver(), "place0: 300 images for 299 labels"),
        (np.arange(300) % 3, [1.0, 0.0], Solver(), "values of C above 0"),
        (np.arange(300) % 3, [], Solver(), "values of C above 0"),
        (
            np.arange(300) % 3,
            [1.0],
            Solver(budget=10_000),
            r"place0: a probe of 16 channels and 3 classes takes 0\.\d+ GB, .* --solver ridge",
        ),
        (
            np.arange(300) % 3,
            [1.0],
            Solver("sklearn", budget=60_000),
            r"place0: scikit-learn takes 0\.\d+ GB for 300 images of 16 channels, .* choose --solver torch",
        ),
    ],
)
def test_what_cannot_be_fitted_is_one_line(labels, strengths, solver, message) -> None:
    train, *_ = problem(300, 16, 3)
    with pytest.raises(InputError, match=message):
        list(fit_probes([train], labels, strengths, solver))
