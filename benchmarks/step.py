"""Our training step against a plain DINOv2 baseline, in one process, on a CPU or a GPU.

    python benchmarks/step.py --arch vit_small --patch-size 14 --batch 4 --precision fp32
    python benchmarks/step.py --arch tiny --prototypes 512 --batch 2     # takes seconds
    python benchmarks/step.py --arch vit_large --patch-size 16 --batch 64 --precision bf16 --compile

Both sides start from the same weights, see the same batches of noise and take turns in random order; their
losses and gradient norms are compared. Times are process CPU time on a CPU, events on a GPU; on a CPU they
hold the page faults of large tensors, unless MALLOC_MMAP_MAX_=0 and a huge MALLOC_TRIM_THRESHOLD_ make the C
library keep its memory. The last line of the output is one JSON object. Needs torch, numpy and omegaconf
only; where the package is not installed, run in the repository's root with PYTHONPATH=. set.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from statistics import mean, median
from typing import Any, get_args

import torch
from arguments import at_least
from step_baseline import Baseline, masks_upper_bound
from step_cost import Cost, device_name, matrix_ceiling, peak_bytes
from step_ours import ARCHS, Ours, checked, initial_weights, random_batch, recipe
from step_turns import Runner, Side, take_turns
from torch import Tensor

from pretrain.command_line import Parser, exit_status
from pretrain.config import schema
from pretrain.config.schema import Config
from pretrain.session import pick_device

SIDES = ("ours", "baseline")
Figures = dict[str, Any]


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="step.py", description=__doc__, formatter_class=raw, allow_abbrev=False)

    def add(name: str, default: object, text: str, **rest: Any) -> None:
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})", **rest)

    add("arch", "vit_small", "backbone; tiny is 2 blocks of width 64", choices=ARCHS)
    add("patch-size", 14, "pixels", type=at_least(1), metavar="P")
    add("ffn", "mlp", "feed-forward layer", choices=["mlp", "swiglu"])
    add("batch", 4, "images a step", type=at_least(2), metavar="B")
    add("head", "mlp", "projection head", choices=["mlp", "rmlp"])
    add("prototypes", 65_536, "outputs of the head", type=at_least(2), metavar="K")
    add("centering", "sinkhorn", "how teacher outputs become targets", choices=["softmax", "sinkhorn"])
    add("drop-path", 0.0, "drop-path rate", type=float, metavar="RATE")
    add("precision", "fp32", "bf16 means autocast, on both sides", choices=["fp32", "bf16"])
    add("attention", "auto", "back end of our side", choices=get_args(schema.Attention))
    add("device", "auto", "auto takes a GPU where there is one", choices=["auto", "cpu", "cuda"])
    add("threads", 1, "threads on a CPU", type=at_least(1), metavar="N")
    add("steps", 1, "steps in a turn, each on its own batch", type=at_least(1), metavar="N")
    add("repeats", 5, "turns of each side after a warm-up turn", type=at_least(1), metavar="N")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block, of our side")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)  # in a child process
    return parser.parse_args()


def configuration(options: argparse.Namespace) -> Config:
    """The recipe with the asked heads and losses.

    Raises:
        InputError: the options contradict one another.
    """
    names = {"ffn_layer": options.ffn, "drop_path_rate": options.drop_path, "attention": options.attention}
    engine = schema.EngineConfig(device=options.device, precision=options.precision, compile=options.compile)
    cfg = replace(
        recipe(options.arch, options.patch_size, options.batch, engine, **names),
        dino_head=schema.HeadConfig(kind=options.head, prototypes=options.prototypes),
        rmlp=schema.RmlpConfig(outputs=options.prototypes),
        loss=schema.LossConfig(centering=options.centering),
    )
    return checked(cfg)


def runner(name: str, cfg: Config, weights: dict[str, Tensor], device: torch.device) -> Runner:
    """One of `SIDES`."""
    side: Side = Ours(cfg, weights, device) if name == "ours" else Baseline(cfg, weights, device)
    return Runner(side, cfg, device)


def peak_memory(name: str, cfg: Config, device: torch.device) -> int:
    """Bytes at the peak of two steps of one side in this process: resident on a CPU, allocated on a GPU."""
    batches = [random_batch(cfg, index).to(device) for index in range(2)]
    runner(name, cfg, initial_weights(cfg), device).turn(batches)
    return peak_bytes(device)


def peak_memory_in_child(name: str) -> int:
    """`peak_memory` of a fresh process; call it while this one is small, for the child inherits its peak."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(options: argparse.Namespace, cfg: Config, device: torch.device) -> Figures:
    """All figures of a run; those in pairs of ours and baseline come out as tables."""
    peaks = {name: peak_memory_in_child(name) / 2**20 for name in SIDES}
    batches = [random_batch(cfg, index) for index in range(options.steps)]
    cost = Cost(cfg, mean(len(batch.mask_indices) for batch in batches))
    ceiling, shape = matrix_ceiling(cost, device)
    weights = initial_weights(cfg)
    sides = {name: runner(name, cfg, weights, device) for name in SIDES}
    take_turns([*sides.values()], [batch.to(device) for batch in batches], options.repeats)
    times = {name: side.seconds() for name, side in sides.items()}
    speedups = [round(theirs / own, 4) for own, theirs in zip(*times.values(), strict=True)]
    floor = cost.total() / ceiling
    return {
        "useful_gflop_per_step": round(cost.total() / 1e9, 2),
        "matrix_ceiling_gflop_per_s": round(ceiling / 1e9, 1),
        "matrix_ceiling_m_k_n": shape,
        "masked_patches_of_first_batch": len(batches[0].mask_indices),
        "masked_patches_in_baselines_buffer": masks_upper_bound(cfg, options.batch),
        "speedup_median": median(speedups),
        "speedup_of_each_turn": speedups,
        "step": {name: summary(times[name], options.batch, floor, peaks[name]) for name in SIDES},
        "parts_median_s": {name: side.parts() for name, side in sides.items()},
        "losses_of_first_step": {name: side.losses[0] for name, side in sides.items()},
        "losses_of_last_step": {name: side.losses[-1] for name, side in sides.items()},
    }


def summary(times: list[float], images: int, floor: float, peak: float) -> dict[str, float]:
    """What a step needs that would take `floor` seconds at the matrix ceiling."""
    return {
        "median_s": median(times),
        "min_s": min(times),
        "max_s": max(times),
        "images_per_s": images / median(times),
        "share_of_ceiling_percent": 100 * floor / median(times),
        "share_of_ceiling_fastest_percent": 100 * floor / min(times),
        "peak_memory_mib": peak,
    }


def setting(options: argparse.Namespace, device: torch.device) -> Figures:
    """What the figures hold for."""
    return {
        **{name: value for name, value in vars(options).items() if name != "memory_of"},
        "device": device_name(device),
        "torch": torch.__version__,
        "clock": "CUDA events" if device.type == "cuda" else "CPU time of the process",
        "load_average": round(os.getloadavg()[0], 1),
    }


def table(title: str, ours: Figures, baseline: Figures) -> str:
    """A row for each figure; the last column is ours / baseline - 1."""
    lines = [f"\n| {title:32} | {'ours':>10} | {'baseline':>10} | {'difference':>10} |"]
    lines.append("|".join(["", "-" * 34, *["-" * 11 + ":"] * 3, ""]))
    for name, value in baseline.items():
        difference = ours[name] / (value or math.nan) - 1
        lines.append(f"| {name:32} | {ours[name]:10.4g} | {value:10.4g} | {difference:10.2g} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    cfg, device = configuration(options), pick_device(options.device)
    if options.memory_of:
        print(peak_memory(options.memory_of, cfg, device))
        return 0
    figures = setting(options, device) | measure(options, cfg, device)
    for name, value in figures.items():
        print(table(name, **value) if isinstance(value, dict) else f"{name}: {value}")
    print(f"\n{json.dumps(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("step.py", main))
