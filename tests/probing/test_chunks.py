"""Sums over chunks against sums over all rows: from a file, from memory, for ridge and for neighbours."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.analysis import knn
from pretrain.analysis.knn import knn_predict, knn_predict_streamed
from pretrain.errors import InputError
from pretrain.probing import chunks, preprocessing
from pretrain.probing.linear import LinearProbe, accuracies
from pretrain.probing.preprocessing import Features, Ints, from_array
from pretrain.probing.ridge import sum_up
from pretrain.probing.solvers import Solver, fit_probes, needed_memory, streamed_rows
from tests.probing.problems import problem

EXACT = Solver(dtype=torch.float64, gap=1e-13)
STRENGTHS = [0.01, 1.0, 100.0]


def path(place: Features, labels: Ints, solver: Solver) -> list[LinearProbe]:
    ((_, found),) = fit_probes([place], labels, STRENGTHS, solver)
    return found


@pytest.mark.parametrize("solver", [Solver(), EXACT])
@pytest.mark.parametrize(("shape", "budget"), [((1500, 48, 10), 250_000), ((600, 32, 2), 100_000)])
def test_rows_of_a_file_give_the_probe_of_rows_in_memory(shape, budget, solver, tmp_path) -> None:
    train, labels, test, test_labels = problem(*shape)
    small = replace(solver, budget=budget * solver.dtype.itemsize // 4, folder=tmp_path)
    assert 64 <= streamed_rows(train, shape[2], small) < shape[0] / 3
    few = [replace(each, max_iterations=4) for each in (solver, small)]  # the same way, not the end alone
    for mine, other in zip(*(path(train, labels, each) for each in few), strict=True):
        apart = np.abs(mine.weights - other.weights).max() / np.abs(mine.weights).max()
        assert apart < 1e4 * torch.finfo(solver.dtype).eps
        assert mine.intercepts == pytest.approx(other.intercepts, abs=1e4 * torch.finfo(solver.dtype).eps)
    whole, parts = path(train, labels, solver), path(train, labels, small)
    for mine, other in zip(whole, parts, strict=True):
        assert mine.converged and other.converged
        assert mine.objective == pytest.approx(other.objective, rel=10 * solver.gap + 1e-12)
    assert accuracies(whole, test, test_labels) == pytest.approx(
        accuracies(parts, test, test_labels), abs=0.11
    )
    assert list(tmp_path.iterdir()) == []


def test_probes_solved_at_once_sum_over_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [problem(300, 12, 5, place) for place in range(3)]
    places, labels = [train for train, *_ in problems], problems[0][1]
    whole = dict(fit_probes(places, labels, STRENGTHS, EXACT))
    monkeypatch.setattr(chunks, "CHUNK", 40 * (13 + 5))
    parts = dict(fit_probes(places, labels, STRENGTHS, EXACT))
    for index in range(3):
        for mine, other in zip(whole[index], parts[index], strict=True):
            assert np.allclose(mine.weights, other.weights, atol=1e-5)
            assert mine.objective == pytest.approx(other.objective, rel=1e-11)


@pytest.mark.parametrize("width", [768, 3072, 6144])  # 6144: FC1 of ViT-B, class token beside mean patch
def test_a_vit_b_of_imagenet_fits_the_budget_in_chunks(width: int) -> None:
    place = from_array(np.broadcast_to(np.float32(0), (1_281_167, width)))
    assert sum(needed_memory(place, 1000, Solver())) > Solver().budget
    assert streamed_rows(place, 1000, Solver()) > 500


def test_a_disk_without_room_is_one_line(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, _, _ = problem(600, 32, 2)
    small = Solver(budget=100_000, folder=tmp_path)
    full = chunks.shutil.disk_usage(tmp_path)._replace(free=600 * 33 * 4 - 1)
    monkeypatch.setattr(chunks.shutil, "disk_usage", lambda _: full)
    with pytest.raises(InputError, match=r"the rows of place0 take 0\.0 GB while a probe is fitted"):
        path(train, labels, small)


def test_moments_of_blocks_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, _, _ = problem(500, 20, 4)
    rows = train.read() + 3.0
    monkeypatch.setattr(preprocessing, "BLOCK", 20 * 70)
    found = sum_up(from_array(rows), labels, 4)
    centred, one_hot = rows - rows.mean(axis=0), np.eye(4)[labels]
    assert np.allclose(found.gram, centred.T @ centred, atol=1e-9)
    assert np.allclose(found.cross, centred.T @ one_hot, atol=1e-9)
    assert found.squares == pytest.approx(((one_hot - one_hot.mean(axis=0)) ** 2).sum())


def test_neighbours_of_blocks_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test, _ = problem(500, 20, 4)
    bank, queries, targets = (torch.from_numpy(part) for part in (train.read(), test.read(), labels))
    whole = [knn_predict(bank, targets, queries, k) for k in (1, 7, 100)]
    monkeypatch.setattr(knn, "CHUNK", 300 * 33)  # also parts of a block
    found = knn_predict_streamed(lambda: bank.split(90), targets, queries.split(300), [1, 7, 100])
    assert torch.equal(found, torch.stack(whole))
    assert len({tuple(row.tolist()) for row in found}) == 3
