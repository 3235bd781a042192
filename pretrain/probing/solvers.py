"""Linear probes of many places of a backbone, by one of three solvers with one interface."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pretrain.errors import InputError
from pretrain.probing.chunks import chunk_rows, resident, streamed
from pretrain.probing.linear import LinearProbe
from pretrain.probing.logistic import Solution, memory, solve
from pretrain.probing.preprocessing import BLOCK, Features, Floats, Ints
from pretrain.probing.ridge import fit_ridge

LEAST = 64  # rows of a chunk: with fewer, a sum takes too long
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # values of C; the paper has 1 alone


@dataclass(frozen=True)
class Solver:
    """How probes are fitted.

    `sklearn` is `LogisticRegression`, the paper's, from a cold start for each C; `torch` minimises the same
    objective for many probes at once, along the C path; `ridge` is least squares on one-hot targets.
    """

    kind: Literal["torch", "sklearn", "ridge"] = "torch"
    max_iterations: int = 5000  # for each C, as in the paper
    gap: float = 1e-7  # torch: estimated distance to the minimum, over the objective
    gradient: float = 1e-4  # sklearn: its `tol`, largest entry of the gradient of the mean loss
    device: str = "cpu"  # of torch
    dtype: torch.dtype = torch.float32  # of torch; fp64 changes accuracies by less than an image
    budget: int = 2 * 2**30  # bytes that the probes solved at once may take; rows of one that has more stream
    folder: Path | None = None  # of temporary files, on a disk; None: the system's


def fit_probes(
    features: Sequence[Features], labels: Ints, strengths: Sequence[float], solver: Solver
) -> Iterator[tuple[int, list[LinearProbe]]]:
    """Fit a linear classifier for each place and each C; features of one place are read at a time.

    The objective is scikit-learn's: C * sum of losses + 0.5 |W|^2, intercepts free; for `ridge` the loss is
    the squared distance to one-hot targets.

    Args:
        features: of the training images at each place, preprocessed.
        labels: (n,) class numbers, any integers.
        strengths: values of C.
        solver: which, and its limits.

    Yields:
        Index of a place and its probes, in the order of the strengths. Places come grouped by their width, as
        soon as they are done.

    Raises:
        InputError: images without label, a single class, a C of 0 or less, features that are not finite, or
            the budget has no room for one probe (`sklearn`: with all images).
    """
    classes, targets = _classes(labels)
    ascending = _ascending(strengths)
    for place in features:
        if place.shape[0] != len(targets):
            raise InputError(
                f"{place.name}: {place.shape[0]} images for {len(targets)} labels; give one each"
            )
    for indices in _chunks(features, len(classes), solver):
        chosen = [features[index] for index in indices]
        for index, path in zip(indices, _fit(chosen, targets, classes, ascending, solver), strict=True):
            by_strength = {probe.strength: probe for probe in path}
            yield index, [by_strength[float(strength)] for strength in strengths]


def _fit(
    features: Sequence[Features], targets: Ints, classes: Ints, strengths: Sequence[float], solver: Solver
) -> list[list[LinearProbe]]:
    match solver.kind:
        case "torch":
            return _by_torch(features, targets, classes, strengths, solver)
        case "sklearn":
            return [_by_sklearn(place.read(), targets, classes, strengths, solver) for place in features]
        case "ridge":
            return [fit_ridge(place, targets, classes, strengths) for place in features]


def _by_torch(
    features: Sequence[Features], targets: Ints, classes: Ints, strengths: Sequence[float], solver: Solver
) -> list[list[LinearProbe]]:
    number, dim = features[0].shape
    labels = torch.from_numpy(targets).to(solver.device)
    limits = len(classes), strengths, solver.gap, solver.max_iterations
    probe, once = needed_memory(features[0], len(classes), solver)
    if once + len(features) * probe <= solver.budget:
        size = chunk_rows(dim + 1, len(classes))
        paths = solve(resident(features, labels, size, solver.dtype), *limits)
    else:
        size = streamed_rows(features[0], len(classes), solver)
        with streamed(features[0], labels, size, solver.dtype, solver.folder) as chunks:
            paths = solve(chunks, *limits)
    return [
        [
            _from_torch(found, classes, strength, number)
            for found, strength in zip(path, strengths, strict=True)
        ]
        for path in paths
    ]


def _from_torch(found: Solution, classes: Ints, strength: float, number: int) -> LinearProbe:
    weights = _numpy(found.weights)
    gradient = found.gradient / (strength * number)
    return LinearProbe(
        strength,
        classes,
        weights[:, :-1].T,
        weights[:, -1],
        found.objective,
        gradient,
        found.iterations,
        found.converged,
    )


def _by_sklearn(
    features: Floats, targets: Ints, classes: Ints, strengths: Sequence[float], solver: Solver
) -> list[LinearProbe]:
    probes = []
    for strength in strengths:
        model = LogisticRegression(C=strength, tol=solver.gradient, max_iter=solver.max_iterations)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(features, targets)
        weights, intercepts = model.coef_.T, model.intercept_
        if len(classes) == 2:  # one column of scores, for the second class
            weights, intercepts = np.hstack([-weights, weights]) / 2, np.array([-0.5, 0.5]) * intercepts
        objective, gradient = logistic_objective(features, targets, weights, intercepts, strength)
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        probes.append(
            LinearProbe(
                strength, classes, weights, intercepts, objective, gradient, int(model.n_iter_[0]), converged
            )
        )
    return probes


def logistic_objective(
    features: Floats, targets: Ints, weights: Floats, intercepts: Floats, strength: float
) -> tuple[float, float]:
    """C * sum of losses + 0.5 |W|^2 (|W|^2 of two classes), and the largest entry of its gradient over C n.

    Args:
        features: (n, d).
        targets: (n,) from 0.
        weights: (d, K).
        intercepts: (K,).
        strength: C.
    """
    scores, rows = features @ weights + intercepts, np.arange(len(targets))
    scores -= scores.max(axis=1, keepdims=True)
    log = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    penalty = 2.0 if len(intercepts) == 2 else 1.0
    errors = np.exp(log)
    errors[rows, targets] -= 1
    gradient = features.T @ errors + penalty * weights / strength
    largest = max(np.abs(gradient).max(), np.abs(errors.sum(axis=0)).max()) / len(targets)
    return float(-strength * log[rows, targets].sum() + 0.5 * penalty * (weights**2).sum()), float(largest)


def _chunks(features: Sequence[Features], classes: int, solver: Solver) -> Iterator[list[int]]:
    """Indices of places of one width that fit into the budget together."""
    order = sorted(range(len(features)), key=lambda index: features[index].shape[1])
    for _, group in groupby(order, key=lambda index: features[index].shape[1]):
        indices = list(group)
        size = _together(features[indices[0]], classes, solver)
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def needed_memory(place: Features, classes: int, solver: Solver) -> tuple[int, int]:
    """Bytes of the torch solver for each probe of this width in memory, and once for all solved together."""
    number, dim = place.shape
    size = min(number, chunk_rows(dim + 1, classes))
    probe, solving = memory(size, dim + 1, classes, solver.dtype.itemsize)
    reading = 4 * 8 * min(BLOCK, number * dim)  # a block in fp64 and what its steps make of it
    return probe + solver.dtype.itemsize * number * (dim + 1), max(solving, reading)


def streamed_rows(place: Features, classes: int, solver: Solver) -> int:
    """Rows of the chunks of one probe that is not held in memory: as many as the budget leaves room for.

    Raises:
        InputError: it leaves none.
    """
    number, dim = place.shape
    itemsize = solver.dtype.itemsize
    without = sum(memory(0, dim + 1, classes, itemsize))
    row = sum(memory(1, dim + 1, classes, itemsize)) - without
    row += 2 * itemsize * (dim + 1)  # this chunk's and the next one's
    most = min(number, chunk_rows(dim + 1, classes))
    least = min(most, LEAST)
    if without + least * row > solver.budget:
        raise InputError(
            f"{place.name}: a probe of {dim} channels and {classes} classes takes "
            f"{(without + least * row) / 1e9:.3f} GB, the budget is {solver.budget / 1e9:.3f} GB; "
            "choose a narrower pool, other places or --solver ridge"
        )
    return min(most, (solver.budget - without) // row)


def _together(place: Features, classes: int, solver: Solver) -> int:
    """Probes of this width that are solved at once."""
    if solver.kind == "sklearn":
        _check_sklearn(place, classes, solver)
    if solver.kind != "torch":
        return 1
    probe, once = needed_memory(place, classes, solver)
    if once + probe > solver.budget:
        streamed_rows(place, classes, solver)  # refuses before anything is read
    return max(1, (solver.budget - once) // probe)


def _check_sklearn(place: Features, classes: int, solver: Solver) -> None:
    number, dim = place.shape
    needed = 8 * number * (dim + 4 * classes)  # features; scores and what becomes of them
    if needed > solver.budget:
        raise InputError(
            f"{place.name}: scikit-learn takes {needed / 1e9:.3f} GB for {number} images of {dim} channels, "
            f"the budget is {solver.budget / 1e9:.3f} GB; choose --solver torch"
        )


def _classes(labels: Ints) -> tuple[Ints, Ints]:
    """The classes, ascending, and the place of each label among them."""
    classes = np.unique(labels)
    if len(classes) < 2:
        raise InputError(
            f"labels: the {len(labels)} training images show one class; a probe needs two or more"
        )
    return classes.astype(np.int64), np.searchsorted(classes, labels)


def _ascending(strengths: Sequence[float]) -> list[float]:
    if not strengths or min(strengths) <= 0:
        raise InputError(f"strengths={list(strengths)}: give values of C above 0, such as 0.01 1 100")
    return sorted({float(strength) for strength in strengths})


def _numpy(tensor: Tensor) -> Floats:
    found: Floats = tensor.double().cpu().numpy()
    return found
