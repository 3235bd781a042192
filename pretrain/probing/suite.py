"""A whole probing run: features of all sets once, then every probe that no row has yet."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.analysis.backbone import build_backbone, model_fingerprint
from pretrain.analysis.page import Table
from pretrain.analysis.taps import Place
from pretrain.errors import InputError
from pretrain.export.weights import Weights
from pretrain.probing.distances import shift_table
from pretrain.probing.experiment import Method, Part, Spec, Task, run, specs
from pretrain.probing.rows import Protocol, Row, Rows
from pretrain.probing.selection import check_disjoint, split
from pretrain.probing.sets import LabelledSet, Preparation
from pretrain.probing.store import FeatureSet, Pool, extract, open_features

TEST_SHARE = 0.2  # of a shifted set that is tested on where the rest is fitted on (paper)
Stage = Callable[[str, int], Callable[[int], None]]  # begins a stage: what, how many; returns what to tell


@dataclass(frozen=True)
class Suite:
    """What a run is asked for."""

    out: Path
    train: LabelledSet
    tests: Sequence[LabelledSet]  # the plain one first, then shifted ones
    protocols: Sequence[Protocol]
    places: Sequence[Place]
    pools: Sequence[Pool]
    controls: bool
    method: Method
    preparation: Preparation
    val_share: float  # of the images that are not tested on
    group_key: str | None  # of the .json members; its groups stay on one side of every split
    batch_size: int
    device: str


def asked(suite: Suite, weights: Weights) -> dict[str, Any]:
    """Everything that rows depend on."""
    model = model_fingerprint(weights)
    sets = [(s.name, s.key(model, suite.preparation, suite.places)) for s in (suite.train, *suite.tests)]
    method = suite.method
    return {
        "model": model,
        "sets": sets,
        "protocols": list(suite.protocols),
        "places": [str(place) for place in suite.places],
        "pools": list(suite.pools),
        "controls": suite.controls,
        "solver": method.kind,
        "strengths": list(method.strengths),
        "seed": method.seed,
        "validation share": suite.val_share,
        "group key": suite.group_key,
    }


def compute_features(suite: Suite, weights: Weights, stage: Stage) -> dict[str, FeatureSet]:
    """Features of all sets by name, from the disk where an earlier run has left them."""
    model, found, backbone = model_fingerprint(weights), {}, None
    for images in (suite.train, *suite.tests):
        folder = suite.out / "features" / images.folder
        key = images.key(model, suite.preparation, suite.places)
        features = open_features(folder, key)
        if features is None:
            backbone = backbone or build_backbone(weights, torch.device(suite.device))
            number = len(images)
            batches = images.batches(suite.preparation, suite.batch_size)
            advance = stage(f"features of {images.name}", number)
            features = extract(backbone, suite.places, batches, number, folder, key, advance)
        found[images.name] = features
    return found


def build_tasks(suite: Suite, features: dict[str, FeatureSet]) -> list[Task]:
    """What is fitted, chosen and tested on which images.

    Raises:
        InputError: a group is on both sides, or a set is too small to be split.
    """
    groups = {
        images.name: images.groups(suite.group_key) if suite.group_key else None
        for images in (suite.train, *suite.tests)
    }
    found = []
    if "transfer" in suite.protocols:
        tests = {s.name: Part(features[s.name], None, groups[s.name]) for s in suite.tests}
        for part in tests.values():
            if part.groups is not None:
                check_disjoint(groups[suite.train.name] or [], part.groups)
        whole = Part(features[suite.train.name], None, groups[suite.train.name])
        found.append(Task(suite.train.name, "transfer", *_halves(whole, suite.val_share, suite), tests))
    if "pretrain" in suite.protocols:
        for images in suite.tests[1:]:
            whole = Part(features[images.name], None, groups[images.name])
            rest, test = _halves(whole, TEST_SHARE, suite)
            fit, val = _halves(rest, suite.val_share, suite)
            found.append(Task(images.name, "pretrain", fit, val, {images.name: test}))
    return found


def _halves(part: Part, share: float, suite: Suite) -> tuple[Part, Part]:
    """The larger and the smaller part, in equal proportions of the classes; groups stay whole."""
    labels = part.labels
    rows = np.arange(len(labels)) if part.rows is None else part.rows
    try:
        halves = split(labels, share, suite.method.seed, part.groups)
    except InputError as error:
        raise InputError(f"{part.features.folder.name}: {error}") from error
    return _some(part, rows, halves.train), _some(part, rows, halves.validation)


def _some(part: Part, rows: np.ndarray, chosen: np.ndarray) -> Part:
    groups = None if part.groups is None else [part.groups[index] for index in chosen]
    return Part(part.features, rows[chosen], groups)


def fit_missing(suite: Suite, weights: Weights, all_tasks: Sequence[Task], rows: Rows, stage: Stage) -> None:
    """Fit every probe that no row has, block by block; each row is on the disk before the next is fitted."""
    wanted = specs(weights.model, suite.places, suite.pools, suite.controls)
    done = {row.key for row in rows.rows}
    for task in all_tasks:
        missing = [spec for spec in wanted if _key(task, spec) not in done]
        advance = stage(f"probes fitted on {task.fitted_on} ({task.protocol})", len(missing))
        for _, group in groupby(missing, key=lambda spec: spec.place.block):
            for row in run(task, list(group), weights.model, suite.method, advance):
                rows.add(row)


def _key(task: Task, spec: Spec) -> tuple[object, ...]:
    place = spec.place
    return (task.fitted_on, task.protocol, place.block, place.point, spec.pool, spec.control)


def ordered(rows: Sequence[Row], wanted: Sequence[Spec], all_tasks: Sequence[Task]) -> list[Row]:
    """Rows in the order of tasks and places, whatever the order in which they were fitted."""
    by_key = {row.key: row for row in rows}
    keys = (_key(task, spec) for task in all_tasks for spec in wanted)
    return [by_key[key] for key in keys if key in by_key]


def distances(suite: Suite, features: dict[str, FeatureSet]) -> Table | None:
    """How far the test sets lie from the training set, at the output of the last block that was read."""
    outputs = [place for place in suite.places if place.point == "RC2"]
    if not outputs:
        return None
    parts = {images.name: Part(features[images.name], None) for images in suite.tests}
    fit = Part(features[suite.train.name], None)
    return shift_table(fit, parts, outputs[-1], suite.pools[0], suite.method.seed)


def facts(suite: Suite, source: Path) -> Iterator[tuple[str, str]]:
    """The protocol in words."""
    yield "weights", str(source)
    for images in (suite.train, *suite.tests):
        yield images.name, " ".join(map(str, images.patterns))
    prepared = suite.preparation
    yield "images", f"shorter side and centre crop {prepared.size} px, mean {list(prepared.scaling.mean)}"
    yield "probes", f"{suite.method.kind}, choices {list(suite.method.strengths)}, seed {suite.method.seed}"
    yield "preprocessing", "rows of length 1, then standardised by the fitted images"
    yield "validation", f"{100 * suite.val_share:g} % of the images that are not tested on"
    if suite.group_key:
        yield "groups", f"{suite.group_key}: on one side of every split"


def figures(rows: Sequence[Row], asked_for: dict[str, Any], shifts: Table | None) -> dict[str, Any]:
    """Everything in the report, as plain values."""
    table = None if shifts is None else [dict(zip(shifts.headings, row, strict=True)) for row in shifts.rows]
    return {"asked": asked_for, "rows": [asdict(row) for row in rows], "shifts": table}
