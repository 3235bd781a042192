"""SINDER's directions and repair, ours against plain sides that follow the released code's schedule.

    python benchmarks/sinder.py directions
    python benchmarks/sinder.py directions --sizes vit_giant2_swiglu    # 4.5 GB of weights
    python benchmarks/sinder.py repair --image-size 518
    python benchmarks/sinder.py repair --sizes tiny --image-size 224    # takes seconds

`directions` times the closed form and, where asked, sampling (`sinder_baseline.py`), with the released
code's least squares and with normal equations, its fastest form. The smallest |cos| over the blocks tells
whether they agree; between two samplings it is no larger.

`repair` times steps on images that show a planted defect: batches of ours, and the plain side with one image
a step. First both take the same images one by one, which also warms them up; their losses must be equal.
Each turn starts from the state after that and takes new images, all sides the same ones.

Sides take turns in random order, in one process, with the same number of threads; times are by the wall.
Set OMP_WAIT_POLICY=PASSIVE where other processes need the cores. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from arguments import at_least
from sinder_baseline import PlainRepair, PlainStep, least_squares, normal_equations, sampled_directions
from sinder_inputs import SIZES, build, defective_weights, middle, model_of, noise, random_blocks
from torch import Tensor

from pretrain.command_line import Parser, exit_status
from pretrain.errors import InputError
from pretrain.sinder.directions import defect_directions
from pretrain.sinder.hits import Criterion
from pretrain.sinder.repair import Repair, RepairSettings, Step

LARGEST_DIFFERENCE = 1e-3  # of two losses, relative
LR = 1e-5  # of both sides in a repair: the planted defect is to last as long as the benchmark
OURS, PLAIN, SAMPLED = "closed form", "plain", ("lstsq", "normal equations")
Figures = dict[str, Any]


def parse() -> argparse.Namespace:
    """The command line."""
    raw, positive = argparse.RawDescriptionHelpFormatter, at_least(1)
    parser = Parser(prog="sinder.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="MEASUREMENT")
    verb = verbs.add_parser("directions", help="seconds to predict the directions", allow_abbrev=False)
    verb.set_defaults(run=run_directions)
    large = ["vit_small", "vit_small_swiglu", "vit_large", "vit_giant2_swiglu"]
    _add(verb, "sizes", large, "backbones, MLP or SwiGLU", nargs="+", choices=SIZES)
    _add(verb, "sampled", large[:2], "of them, those to sample for", nargs="*", choices=SIZES)
    _add(verb, "samples", 100_000, "for each block", type=positive)
    _add(verb, "repeats", 3, "turns of each side", type=positive)
    _add(verb, "lstsq-repeats", 1, "turns of the slowest side", type=positive)
    verb = verbs.add_parser("repair", help="images a second of a repair", allow_abbrev=False)
    verb.set_defaults(run=run_repair)
    _add(verb, "sizes", ["vit_small", "vit_small_40"], "backbones, MLP or SwiGLU", nargs="+", choices=SIZES)
    _add(verb, "image-size", 518, "pixels, a multiple of 14", type=positive)
    _add(verb, "batches", [1, 4, 8], "images a step of ours", type=positive, nargs="+")
    _add(verb, "bf16", False, "ours in bfloat16, too", action="store_true")
    _add(verb, "check", 10, "images whose losses are compared", type=positive)
    _add(verb, "images", 8, "in a turn", type=positive)
    _add(verb, "clean", 2, "of them, those without anything that triggers the defect", type=at_least(0))
    _add(verb, "repeats", 3, "turns of each side", type=positive)
    return parser.parse_args()


def _add(parser: argparse.ArgumentParser, name: str, default: object, text: str, **rest: Any) -> None:
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    parser.add_argument(f"--{name}", default=default, help=f"{text} (default {shown})", **rest)


def run_directions(options: argparse.Namespace) -> Figures:
    """Figures by size of the backbone."""
    return {size: measure_directions(size, options) for size in options.sizes}


def measure_directions(size: str, options: argparse.Namespace) -> Figures:
    """Seconds of each side, and whether their directions agree."""
    model = model_of(size, 518)
    state = random_blocks(model)
    seeds = iter(range(10**6))

    def sampled(solve: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: sampled_directions(state, model, options.samples, solve, next(seeds))

    sides = {OURS: lambda: [layer.direction.float() for layer in defect_directions(state, model)]}
    if size in options.sampled:
        sides |= {"lstsq": sampled(least_squares), "normal equations": sampled(normal_equations)}
    turns = {side: options.lstsq_repeats if side == "lstsq" else options.repeats for side in sides}
    sides[OURS]()  # a warm-up
    times: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, list[list[Tensor]]] = {side: [] for side in sides}
    for side in shuffled_turns(turns):
        since = time.perf_counter()
        found[side].append(sides[side]())
        times[side].append(time.perf_counter() - since)
    return {
        "seconds": {side: spread(values) for side, values in times.items()},
        "speedup_of_medians": {
            side: median(values) / median(times[OURS]) for side, values in times.items() if side != OURS
        },
        **agreement(found),
    }


def agreement(found: Mapping[str, list[list[Tensor]]]) -> Figures:
    """The smallest |cos| of two directions of the same block: ours and sampled ones, and sampled ones."""
    samplings = [one for side in SAMPLED for one in found.get(side, [])]
    if not samplings:
        return {}
    pairs = {
        "with_sampled": [(found[OURS][0], one) for one in samplings],
        "between_samplings": pairwise(samplings),
    }
    return {
        f"smallest_cosine_{name}": min(
            (abs(float(a @ b)) for one, other in both for a, b in zip(one, other, strict=True)), default=None
        )
        for name, both in pairs.items()
    }


def run_repair(options: argparse.Namespace) -> Figures:
    """Figures by size of the backbone.

    Raises:
        InputError: an option that does not fit the others.
    """
    if options.image_size % 14:
        raise InputError(f"--image-size: {options.image_size} px is not a multiple of the patch size 14")
    if any(options.images % batch for batch in options.batches):
        raise InputError("--images: must be a multiple of each of --batches")
    if options.clean > options.images:
        raise InputError(f"--clean: must be from 0 to --images={options.images}, got {options.clean}")
    return {size: measure_repair(size, options) for size in options.sizes}


class Side:
    """A way to repair, that takes the same images again and again from the same state."""

    def __init__(self, repair: Repair | PlainRepair, batch: int, bf16: bool = False) -> None:
        self.repair, self.batch, self.bf16 = repair, batch, bf16
        self.start = repair.state_dict()
        self.times: list[float] = []
        self.clean = 0

    def turn(self, images: Tensor) -> None:
        """Time a turn, and count images that showed no defect."""
        self.repair.load_state_dict(self.start)
        if isinstance(self.repair, Repair):
            self.repair.settings = replace(self.repair.settings, bf16=self.bf16)
        since = time.perf_counter()
        steps = [self.repair.step(batch) for batch in images.split(self.batch)]
        self.times.append(time.perf_counter() - since)
        self.clean += len(images) - sum(defective_images(step) for step in steps)


def defective_images(step: Step | PlainStep) -> int:
    """How many images of a step showed defects."""
    return step.defective_images if isinstance(step, Step) else int(step.block >= 0)


def measure_repair(size: str, options: argparse.Namespace) -> Figures:
    """Images a second of each side."""
    model = model_of(size, options.image_size)
    block = middle(model)
    state = defective_weights(model, block)
    directions = [layer.direction.float() for layer in defect_directions(state, model)]
    settings = RepairSettings(Criterion(first_block=block), lr=LR)
    plain = PlainRepair(state, model, directions, settings.criterion, settings.lr, settings.momentum)
    ours = Repair(build(model, state), directions, settings)
    checked = compare_losses(ours, plain, noise(model, options.check, seed=1))
    sides = {PLAIN: Side(plain, 1)}
    for bf16 in (False, True) if options.bf16 else (False,):
        sides |= {f"batch {n}{', bf16' * bf16}": Side(ours, n, bf16) for n in options.batches}
    warm = noise(model, max(options.batches), seed=2)
    for side in sides.values():
        side.turn(warm[: side.batch])
        side.times, side.clean = [], 0
    for number in range(options.repeats):
        images = noise(model, options.images, 3 + number, options.clean)
        for name in random.Random(number).sample([*sides], len(sides)):
            sides[name].turn(images)
    return {"defect_from_block": block, **checked, **repair_figures(sides, options)}


def repair_figures(sides: Mapping[str, Side], options: argparse.Namespace) -> Figures:
    """By side; a speed-up is that of a turn."""
    plain, seen = sides[PLAIN].times, options.images * options.repeats
    return {
        "images_per_s": {
            name: spread([options.images / seconds for seconds in side.times]) for name, side in sides.items()
        },
        "speedup": {
            name: spread([one / own for one, own in zip(plain, side.times, strict=True)])
            for name, side in sides.items()
            if name != PLAIN
        },
        "clean_images_percent": {name: 100 * side.clean / seen for name, side in sides.items()},
    }


def compare_losses(ours: Repair, plain: PlainRepair, images: Tensor) -> Figures:
    """The largest relative difference of their losses, image by image.

    Raises:
        InputError: it is too large, or no image shows the defect.
    """
    pairs = [(ours.step(image), plain.step(image)) for image in images.split(1)]
    differences = [abs(own.loss / other.loss - 1) if other.loss else own.loss for own, other in pairs]
    if not any(other.loss for _, other in pairs):
        raise InputError("no image shows the planted defect; take a larger --image-size or --check")
    for number, (own, other) in enumerate(pairs):
        if differences[number] > LARGEST_DIFFERENCE or own.first_block != other.block:
            raise InputError(
                f"the sides disagree on image {number}: loss {own.loss:.6g} at block {own.first_block}, "
                f"plain {other.loss:.6g} at block {other.block}"
            )
    losses = [own.loss for own, _ in pairs]
    return {"losses_of_first_images": losses, "largest_relative_difference": max(differences)}


def shuffled_turns(turns: Mapping[str, int]) -> list[str]:
    """Names in the order of their turns: each round has those with turns left, in random order."""
    order, rounds = random.Random(0), range(max(turns.values()))
    return [name for number in rounds for name in order.sample([*turns], len(turns)) if number < turns[name]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each name."""
    lines = [f"\n| {title:24} | {'median':>9} | {'min':>9} | {'max':>9} |"]
    lines.append("|".join(["", "-" * 26, *["-" * 10 + ":"] * 3, ""]))
    for name, row in rows.items():
        lines.append(f"| {name:24} | {row['median']:9.4g} | {row['min']:9.4g} | {row['max']:9.4g} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    options = parse()
    load = os.getloadavg()[0]
    figures = options.run(options)
    for size, found in figures.items():
        print(f"\n{size}")
        for name, value in found.items():
            rows = isinstance(value, dict) and all(isinstance(row, dict) for row in value.values())
            print(table(name, value) if rows else f"{name}: {value}")
    setting = {name: value for name, value in vars(options).items() if name != "run"}
    machine = {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "load_average_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    print(f"\n{json.dumps({**setting, **machine, 'sizes': figures})}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("sinder.py", main))
