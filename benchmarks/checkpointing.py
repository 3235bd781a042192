"""What activation checkpointing costs in time and saves in memory: none, selective and full, side by side.

    python benchmarks/checkpointing.py
    python benchmarks/checkpointing.py --sizes tiny --batch 2 --prototypes 256 --repeats 1     # takes seconds

For each backbone and precision three trainers with the same weights take turns on the same batch of noise,
in random order in one process; their losses are compared. Peak memory is that of two steps in a process of
its own. Times are process CPU time on a CPU, events on a GPU; on a CPU they hold the page faults of large
tensors, unless MALLOC_MMAP_MAX_=0 and a huge MALLOC_TRIM_THRESHOLD_ make the C library keep its memory. The
last line of the output is one JSON object. Needs torch, numpy and omegaconf only; where the package is not
installed, run in the repository's root with PYTHONPATH=. set.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any, get_args

import torch
from arguments import at_least
from step_cost import device_name, peak_bytes
from step_ours import ARCHS, Ours, checked, initial_weights, random_batch, recipe
from step_turns import Runner, take_turns

from pretrain.command_line import Parser, exit_status
from pretrain.config import schema
from pretrain.config.schema import Config, Recomputed
from pretrain.session import pick_device

MODES: tuple[Recomputed, ...] = get_args(Recomputed)
Figures = dict[str, Any]


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="checkpointing.py", description=__doc__, formatter_class=raw, allow_abbrev=False)

    def add(name: str, default: object, text: str, **rest: Any) -> None:
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})", **rest)

    add("sizes", ["vit_small"], "backbones; tiny is 2 blocks of width 64", nargs="+", choices=ARCHS)
    add("precisions", ["bf16", "fp32"], "bf16 means autocast", nargs="+", choices=["bf16", "fp32"])
    add("batch", 4, "images a step", type=at_least(2), metavar="B")
    add("patch-size", 14, "pixels", type=at_least(1), metavar="P")
    add("prototypes", 65_536, "outputs of the head", type=at_least(2), metavar="K")
    add("drop-path", 0.0, "drop-path rate", type=float, metavar="RATE")
    add("attention", "auto", "back end", choices=get_args(schema.Attention))
    add("device", "auto", "auto takes a GPU where there is one", choices=["auto", "cpu", "cuda"])
    add("threads", 1, "threads on a CPU", type=at_least(1), metavar="N")
    add("repeats", 3, "turns of each mode after a warm-up turn", type=at_least(1), metavar="N")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # in a child process
    return parser.parse_args()


def configuration(options: argparse.Namespace, size: str, precision: Any, mode: Recomputed) -> Config:
    """The recipe of a size.

    Raises:
        InputError: the options contradict one another.
    """
    engine = schema.EngineConfig(device=options.device, precision=precision, activation_checkpointing=mode)
    model = {"drop_path_rate": options.drop_path, "attention": options.attention}
    cfg = recipe(size, options.patch_size, options.batch, engine, **model)
    return checked(replace(cfg, dino_head=schema.HeadConfig(prototypes=options.prototypes)))


def trainer(cfg: Config, weights: dict[str, torch.Tensor], device: torch.device) -> Runner:
    """A trainer and its turns."""
    return Runner(Ours(cfg, weights, device), cfg, device)


def peak_memory(cfg: Config, device: torch.device) -> int:
    """Bytes at the peak of two steps in this process."""
    trainer(cfg, initial_weights(cfg), device).turn([random_batch(cfg, i).to(device) for i in range(2)])
    return peak_bytes(device)


def peak_memory_in_child(size: str, precision: str, mode: Recomputed) -> float:
    """MiB of `peak_memory` in a fresh process; call it first: a child inherits the peak."""
    command = [sys.executable, *sys.argv, "--memory-of", size, precision, mode]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) / 2**20


def measure(
    options: argparse.Namespace, size: str, precision: str, peaks: Mapping[Recomputed, float]
) -> Figures:
    """All figures of a backbone in one precision."""
    device = pick_device(options.device)
    configs = {mode: configuration(options, size, precision, mode) for mode in MODES}
    weights, batch = initial_weights(configs["none"]), random_batch(configs["none"], 0).to(device)
    sides = {mode: trainer(cfg, weights, device) for mode, cfg in configs.items()}
    take_turns([*sides.values()], [batch], options.repeats)
    parts = {mode: side.parts() for mode, side in sides.items()}
    return {
        "modes": {mode: row(side, options.batch, peaks[mode], sides["none"]) for mode, side in sides.items()},
        "parts_median_s": parts,
        "selective_of_full": selective_of_full(sides),
        "largest_relative_difference_of_losses": difference(sides),
    }


def row(side: Runner, images: int, peak: float, none: Runner) -> Figures:
    """What a mode takes; `slower` is the median over the turns of its time by that of none."""
    times = side.seconds()
    return {
        "step_s": median(times),
        "min_s": min(times),
        "max_s": max(times),
        "images_per_s": images / median(times),
        "slower": median(mine / theirs for mine, theirs in zip(times, none.seconds(), strict=True)),
        "peak_memory_mib": peak,
    }


def selective_of_full(sides: Mapping[Recomputed, Runner]) -> float:
    """Of the time that full adds to a step, the part that selective adds; from the fastest turns."""
    names = ("student forward", "backward")
    fastest = {
        mode: min(sum(turn[name] for name in names) for turn in side.turns[1:])
        for mode, side in sides.items()
    }
    return (fastest["selective"] - fastest["none"]) / (fastest["full"] - fastest["none"])


def difference(sides: Mapping[Recomputed, Runner]) -> float:
    """Of the total losses and gradient norms of all steps."""
    largest = 0.0
    for mode in MODES[1:]:
        for mine, theirs in zip(sides[mode].losses, sides["none"].losses, strict=True):
            largest = max(largest, *(abs(mine[key] / theirs[key] - 1) for key in theirs if theirs[key]))
    return largest


def table(figures: Mapping[str, Figures]) -> str:
    """A row for each mode of each size and precision."""
    lines = [
        "| backbone | mode | step, s | range | images / s | x none | peak, MiB |",
        "|---|---|" + "--:|" * 5,
    ]
    for name, found in figures.items():
        for mode, cells in found["modes"].items():
            spread = f"{cells['min_s']:.3g} - {cells['max_s']:.3g}"
            speed = f"{cells['images_per_s']:.3g} | {cells['slower']:.3g} | {cells['peak_memory_mib']:.0f}"
            lines.append(f"| {name} | {mode} | {cells['step_s']:.3g} | {spread} | {speed} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    if options.memory_of:
        print(peak_memory(configuration(options, *options.memory_of), device))
        return 0
    cases = [(size, precision) for size in options.sizes for precision in options.precisions]
    for case in cases:
        configuration(options, *case, "none")
    peaks = {case: {mode: peak_memory_in_child(*case, mode) for mode in MODES} for case in cases}
    found = {" ".join(case): measure(options, *case, peaks[case]) for case in cases}
    print(table(found))
    setting = {
        **{name: value for name, value in vars(options).items() if name != "memory_of"},
        "device": device_name(device),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(f"\n{json.dumps({**setting, 'cases': found})}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("checkpointing.py", main))
