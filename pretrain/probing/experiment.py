"""Probes of many places: fitted on one part of the images, chosen on another, tested on sets apart."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.analysis.knn import knn_predict_streamed
from pretrain.analysis.taps import Place, Point
from pretrain.analysis.uncertainty import bootstrap
from pretrain.config.derived import ffn_hidden_dim, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.probing.controls import fit_pca, random_features, random_projection
from pretrain.probing.linear import LinearProbe, accuracies, predictions
from pretrain.probing.preprocessing import Features, Floats, Ints, prepare, unit_rows
from pretrain.probing.rows import Control, Kind, Protocol, Row, Score
from pretrain.probing.solvers import Solver, fit_probes
from pretrain.probing.store import FeatureSet, Pool

WIDE: tuple[Point, ...] = ("FC1", "Act")  # wider than the model: compared at its width too
NEIGHBOURS = (10, 20, 100)  # values of k
QUERIES = 8192  # of k-NN at once, for each of which all training rows are read


class Spec(NamedTuple):
    """One probe."""

    place: Place
    pool: Pool
    control: Control


class Part(NamedTuple):
    """Some images of a set."""

    features: FeatureSet
    rows: Ints | None  # ascending; None = all
    groups: Sequence[str] | None = None  # of these images

    @property
    def labels(self) -> Ints:
        """Classes of these images."""
        labels = self.features.labels
        return labels if self.rows is None else labels[self.rows]


@dataclass(frozen=True)
class Task:
    """What probes are fitted, chosen and tested on."""

    fitted_on: str
    protocol: Protocol
    fit: Part
    val: Part
    tests: dict[str, Part]


@dataclass(frozen=True)
class Method:
    """How they are fitted."""

    kind: Kind
    strengths: Sequence[float]
    solver: Solver
    seed: int


def specs(model: ModelConfig, places: Sequence[Place], pools: Sequence[Pool], controls: bool) -> list[Spec]:
    """All probes of a task; with controls those that answer whether width alone explains a difference.

    FC1 and Act at the model's width, by a random projection and by their main components; RC2 at the width
    of Act, by random features.
    """
    found = []
    for place in places:
        kinds: list[Control] = ["none"]
        if controls and place.point in WIDE and ffn_hidden_dim(model) > vit_shape(model).embed_dim:
            kinds += ["random projection", "PCA"]
        if controls and place.point == "RC2":
            kinds += ["random features"]
        found += [Spec(place, pool, kind) for pool in pools for kind in kinds]
    return found


def run(
    task: Task,
    wanted: Sequence[Spec],
    model: ModelConfig,
    method: Method,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Row]:
    """Fit probes and yield a row for each as it is done."""
    prepared = [_prepared(task, spec, model, method) for spec in wanted]
    if method.kind == "knn":
        for spec, (fit, val, tests) in zip(wanted, prepared, strict=True):
            yield _row(task, spec, method, _neighbours(task, fit, val, tests))
            advance(1)
        return
    fits = [fit for fit, _, _ in prepared]
    for index, probes in fit_probes(fits, task.fit.labels, method.strengths, method.solver):
        _, val, tests = prepared[index]
        yield _row(task, wanted[index], method, _linear(task, probes, val, tests))
        advance(1)


def _prepared(
    task: Task, spec: Spec, model: ModelConfig, method: Method
) -> tuple[Features, Features, list[Features]]:
    """Features of fit, val and tests as the probe sees them; statistics are those of fit alone."""
    parts = [task.fit, task.val, *task.tests.values()]
    raw = [part.features.features(spec.place, spec.pool, part.rows) for part in parts]
    if method.kind == "knn":
        fit, val, *tests = [features.then(unit_rows) for features in raw]
        return fit, val, tests
    fit, val, *tests = prepare(*raw)
    if spec.control != "none":
        change = _control(spec, fit, model, method.seed)
        fit, val, *tests = prepare(*(f.then(change) for f in (fit, val, *tests)), unit_length=False)
    return fit, val, tests


def _control(spec: Spec, fit: Features, model: ModelConfig, seed: int) -> Callable[[Floats], Floats]:
    channels, dim, hidden = fit.shape[1], vit_shape(model).embed_dim, ffn_hidden_dim(model)
    copies = 2 if spec.pool == "cls+patch_mean" else 1
    match spec.control:
        case "random projection":
            return random_projection(channels, copies * dim, seed).apply
        case "PCA":
            return fit_pca(fit, min(copies * dim, fit.shape[0] - 1)).apply
        case _:
            return random_features(channels, copies * hidden, seed).apply


class _Outcome(NamedTuple):
    """What a probe shows."""

    width: int
    chosen: float
    val_by_choice: dict[str, float]
    right: list[Floats]  # of each test set, 1 where an image is classified rightly
    iterations: int
    converged: bool


def _linear(task: Task, probes: Sequence[LinearProbe], val: Features, tests: Sequence[Features]) -> _Outcome:
    """C by validation accuracy; of equal ones the smallest."""
    scores = accuracies(probes, val, task.val.labels)
    order = sorted(range(len(probes)), key=lambda index: (-scores[index], probes[index].strength))
    best = probes[order[0]]
    right = [
        (predictions([best], features)[0] == part.labels).astype(np.float64)
        for features, part in zip(tests, task.tests.values(), strict=True)
    ]
    by_choice = {f"{probe.strength:g}": score for probe, score in zip(probes, scores, strict=True)}
    converged = all(probe.converged for probe in probes)
    iterations = sum(probe.iterations for probe in probes)
    return _Outcome(val.shape[1], best.strength, by_choice, right, iterations, converged)


def _neighbours(task: Task, fit: Features, val: Features, tests: Sequence[Features]) -> _Outcome:
    """k by validation accuracy; of equal ones the smallest."""
    labels = torch.from_numpy(task.fit.labels)

    def right(features: Features, part: Part, counts: Sequence[int]) -> Floats:
        queries = map(torch.from_numpy, features.batches(QUERIES))
        found = knn_predict_streamed(partial(_tensors, fit), labels, queries, counts)
        return (found.numpy() == part.labels).astype(np.float64)

    counts = [k for k in NEIGHBOURS if k <= len(labels)] or [1]
    means = right(val, task.val, counts).mean(axis=1)
    scores = {k: 100 * float(mean) for k, mean in zip(counts, means, strict=True)}
    best = min(counts, key=lambda k: (-scores[k], k))
    found = [right(f, part, [best])[0] for f, part in zip(tests, task.tests.values(), strict=True)]
    by_choice = {f"{k}": score for k, score in scores.items()}
    return _Outcome(val.shape[1], best, by_choice, found, 0, True)


def _tensors(features: Features) -> Iterator[Tensor]:
    return (torch.from_numpy(block).float() for _, block in features.blocks())


def _row(task: Task, spec: Spec, method: Method, outcome: _Outcome) -> Row:
    test = {
        name: _score(right, part.groups, method.seed)
        for (name, part), right in zip(task.tests.items(), outcome.right, strict=True)
    }
    return Row(
        task.fitted_on,
        task.protocol,
        spec.place.block,
        spec.place.point,
        spec.pool,
        spec.control,
        outcome.width,
        method.kind,
        outcome.chosen,
        outcome.val_by_choice[f"{outcome.chosen:g}"],
        outcome.val_by_choice,
        test,
        len(task.fit.labels),
        len(task.val.labels),
        outcome.iterations,
        outcome.converged,
        method.seed,
    )


def _score(right: Floats, groups: Sequence[str] | None, seed: int) -> Score:
    interval = bootstrap(100 * right, seed, groups)
    return Score(interval.mean, interval.low, interval.high)
