"""The batched solver of tools/probe.py against scikit-learn's, for every probe of a backbone.

    export OMP_NUM_THREADS=1
    python benchmarks/probe.py teacher.safetensors --train 'train-*.tar' --test 'test-*.tar'
    python benchmarks/probe.py teacher.safetensors --train 'train-*.tar' --test 'test-*.tar' --C 0.01 1 100

Features of all places are computed once, kept under --work, and serve both. Block by block the two take
turns, in alternating order: each prepares the features, fits a probe for every place and C, and tests it.
Times are CPU seconds of the process, so that other load on the machine hardly counts; with one thread they
are comparable. scikit-learn starts each C from zero, as its users do. The last line is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from pretrain.analysis.images import image_size
from pretrain.analysis.scaling import add_scaling, scaling_for
from pretrain.analysis.taps import places
from pretrain.command_line import Parser, exit_status
from pretrain.errors import InputError
from pretrain.export.weights import Weights, read_weights
from pretrain.probing.experiment import Method, Spec, Task, run, specs
from pretrain.probing.rows import Row
from pretrain.probing.sets import LabelledSet, Preparation
from pretrain.probing.solvers import STRENGTHS, Solver
from pretrain.probing.suite import Suite, build_tasks, compute_features

Side = Literal["torch", "sklearn"]
SIDES: tuple[Side, Side] = ("torch", "sklearn")


@dataclass
class Fitted:
    """What one side found, and how long it took."""

    rows: list[Row] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # seconds by block
    wall: list[float] = field(default_factory=list)


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="probe.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="CKPT", type=Path, help="weights of any known format")
    add("--train", metavar="SHARDS", nargs="+", required=True, help="a fifth of it chooses C")
    add("--test", metavar="SHARDS", nargs="+", required=True, help="labelled shards too")
    add_scaling(parser)
    add("--C", type=float, nargs="+", default=[1.0], help="strengths; default 1 (paper); tools/probe.py: six")
    add("--work", type=Path, default=Path("runs/probe_benchmark"), help="for the features")
    return parser.parse_args()


def suite_of(options: argparse.Namespace, weights: Weights) -> Suite:
    """Every place, the paper's pool, no control."""
    return Suite(
        options.work,
        LabelledSet("train", options.train, "--train"),
        [LabelledSet("test", options.test, "--test")],
        ("transfer",),
        places(weights.model),
        ["all_mean"],
        False,
        _method("torch", options.C),
        Preparation(image_size(weights), scaling_for(options, weights)),
        val_share=0.2,
        group_key=None,
        batch_size=64,
        device="cpu",
    )


def _method(side: Side, strengths: Sequence[float]) -> Method:
    return Method(side, strengths, Solver(side), seed=0)


def fit(task: Task, wanted: Sequence[Spec], weights: Weights, method: Method, into: Fitted) -> None:
    """All probes of a block by one side."""
    cpu, wall = time.process_time(), time.perf_counter()
    into.rows += run(task, wanted, weights.model, method)
    into.cpu.append(time.process_time() - cpu)
    into.wall.append(time.perf_counter() - wall)


def measure(options: argparse.Namespace) -> dict[Side, Fitted]:
    """Both sides, turn by turn."""
    weights = read_weights(options.source)
    suite = suite_of(options, weights)
    features = compute_features(suite, weights, lambda _what, _total: lambda _number: None)
    (task,) = build_tasks(suite, features)
    wanted = specs(weights.model, suite.places, suite.pools, suite.controls)
    found: dict[Side, Fitted] = {side: Fitted() for side in SIDES}
    for block, group in groupby(wanted, key=lambda spec: spec.place.block):
        of_block = list(group)
        for side in SIDES if block % 2 == 0 else SIDES[::-1]:
            fit(task, of_block, weights, _method(side, options.C), found[side])
        torch_s, sklearn_s = (found[side].cpu[-1] for side in SIDES)
        print(f"block {block}: torch {torch_s:.1f} s, sklearn {sklearn_s:.1f} s of CPU time", flush=True)
    return found


def figures(found: dict[Side, Fitted], options: argparse.Namespace) -> dict[str, Any]:
    """What the two sides say and take."""
    ours, theirs = (sorted(found[side].rows, key=lambda row: row.key) for side in SIDES)
    test = np.array([[row.test["test"].accuracy for row in rows] for rows in (ours, theirs)])
    ratios = [b / a for a, b in zip(found["torch"].cpu, found["sklearn"].cpu, strict=True)]
    return {
        "probes": len(ours),
        "strengths": list(options.C),
        "fit_images": ours[0].fit_images,
        "threads": torch.get_num_threads(),
        "cpu_s": {side: sum(found[side].cpu) for side in SIDES},
        "wall_s": {side: sum(found[side].wall) for side in SIDES},
        "cpu_ratio": sum(found["sklearn"].cpu) / sum(found["torch"].cpu),
        "cpu_ratio_by_block": {"min": min(ratios), "median": median(ratios), "max": max(ratios)},
        "test_accuracy_mean_percent": dict(zip(SIDES, test.mean(axis=1).tolist(), strict=True)),
        "largest_test_difference_points": float(np.abs(test[0] - test[1]).max()),
        "same_choice": sum(a.chosen == b.chosen for a, b in zip(ours, theirs, strict=True)),
        "converged": {side: sum(row.converged for row in found[side].rows) for side in SIDES},
    }


def main() -> int:
    """Measure and print."""
    options = parse()
    if not options.C or min(options.C) <= 0:
        raise InputError(f"--C: must be above 0, such as {' '.join(f'{c:g}' for c in STRENGTHS)}")
    print(json.dumps(figures(measure(options), options)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("probe.py", main))
