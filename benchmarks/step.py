"""Our training step against a plain DINOv2 baseline, in one process, on a CPU or a GPU.

    python benchmarks/step.py --arch vit_small --patch-size 14 --batch 4 --precision fp32
    python benchmarks/step.py --arch tiny --prototypes 512 --batch 2     # takes seconds

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
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any, NoReturn, get_args

import torch
from step_baseline import Baseline, Mark, masks_upper_bound
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config import schema
from pretrain.config.checks import check
from pretrain.config.derived import drop_path_rates, ffn_hidden_dim, kept_rows, rmlp_widths, vit_shape
from pretrain.config.schema import Config
from pretrain.data.drop_path import drop_subsets
from pretrain.data.masking import group_masks
from pretrain.engines.single import SingleEngine
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.method.outputs import share_prototypes
from pretrain.models.attention import resolve_backend
from pretrain.models.init import init_weights
from pretrain.optim.schedules import Schedules, StepValues
from pretrain.seeding import numpy_stream, torch_stream
from pretrain.session import pick_device

GLOBAL_SIZE, LOCAL_SIZE = 224, 96  # pixels; the second is rounded to whole patches
TINY = {"arch": "custom", "embed_dim": 64, "depth": 2, "num_heads": 2}
SIDES = ("ours", "baseline")
Figures = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """Wrong input is one line and status 2."""

    def error(self, message: str) -> NoReturn:
        """Without the usage."""
        self.exit(2, f"step.py: {message} (--help lists the options)\n")


def at_least(least: int) -> Callable[[str], int]:
    """A type of option: whole numbers from `least` up."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} up, got {text}")
        return int(text)

    return number


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="step.py", description=__doc__, formatter_class=raw, allow_abbrev=False)

    def add(name: str, default: object, text: str, **rest: Any) -> None:
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})", **rest)

    archs = ["tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"]
    add("arch", "vit_small", "backbone; tiny is 2 blocks of width 64", choices=archs)
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
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)  # in a child process
    return parser.parse_args()


def configuration(options: argparse.Namespace) -> Config:
    """The short recipe at the asked size; LayerScale 1, so that every block counts in the losses."""
    patch, batch = options.patch_size, options.batch
    shape = {"patch_size": patch, "img_size": GLOBAL_SIZE, "ffn_layer": options.ffn, "layer_scale": 1.0}
    shape |= TINY if options.arch == "tiny" else {"arch": options.arch}
    local = max(round(LOCAL_SIZE / patch), 1) * patch
    crops = {"global_crops": schema.CropConfig(GLOBAL_SIZE), "local_crops": schema.LocalCropConfig(local)}
    cfg = Config(
        model=schema.ModelConfig(**shape, drop_path_rate=options.drop_path, attention=options.attention),
        dino_head=schema.HeadConfig(kind=options.head, prototypes=options.prototypes),
        rmlp=schema.RmlpConfig(outputs=options.prototypes),
        loss=schema.LossConfig(centering=options.centering),
        data=schema.DataConfig(group_size=batch, **crops),
        optim=schema.OptimConfig(global_batch_size=batch, warmup_steps=1, freeze_last_layer_steps=0),
        engine=schema.EngineConfig(device=options.device, precision=options.precision),
    )
    check(cfg)
    return cfg


def random_batch(cfg: Config, index: int) -> Batch:
    """Images of noise with DINOv2's masks and drop-path rows."""
    images, local = cfg.data.group_size, cfg.data.local_crops
    rng, noise = numpy_stream(0, "masks", index), torch_stream(0, "images", index)
    masks = torch.from_numpy(group_masks(cfg.mask, GLOBAL_SIZE // cfg.model.patch_size, 2 * images, rng))
    counts, rates = masks.sum(1), drop_path_rates(cfg.model)
    rows = [drop_subsets(rates, number * images, rng) for number in (2, local.number)]
    return Batch(
        torch.randn(2 * images, 3, GLOBAL_SIZE, GLOBAL_SIZE, generator=noise),
        torch.randn(local.number * images, 3, local.size, local.size, generator=noise),
        masks,
        masks.flatten().nonzero().flatten(),
        (1 / counts.clamp(min=1).float()).repeat_interleave(counts),
        *(None if part is None else torch.from_numpy(part) for part in rows),
        group_size=images,
        position=index * images,
    )


def initial_weights(cfg: Config) -> dict[str, Tensor]:
    """A branch's weights, by name."""
    branch = SSLBranch(cfg, "student")
    init_weights(branch, cfg.run.seed)
    return branch.state_dict()


class Ours:
    """The package's step, in the order of `pretrain.train.train_step`."""

    def __init__(self, cfg: Config, weights: dict[str, Tensor], device: torch.device) -> None:
        backend = resolve_backend(cfg.model.attention, device, cfg.engine.precision == "bf16")
        student, teacher = SSLBranch(cfg, "student", backend), SSLBranch(cfg, "teacher", backend)
        student.load_state_dict(weights)
        teacher.load_state_dict(weights)
        self.method = DinoV2(cfg)
        self.engine = SingleEngine(student, teacher, self.method, cfg.optim, cfg.engine, device)
        self.sums: dict[str, Tensor] = {}

    def step(self, batch: Batch, step: int, values: StepValues, mark: Mark) -> dict[str, Tensor]:
        """One training step; its losses and gradient norms, still on the device."""
        self.engine.begin_step(step, values)
        outputs = share_prototypes([self.engine.teacher(batch)])
        mark("teacher")
        targets = self.method.targets(outputs, [batch.mask_weights], values.teacher_temp, step)
        mark("targets")
        student = self.engine.student(batch)
        mark("student forward")
        terms = self.method.losses(student, targets[0], batch)
        mark("losses")
        self.engine.backward(terms.total)
        mark("backward")
        result = self.engine.step()
        self.method.commit(result.good)
        mark("clip + optimizer")
        self.engine.update_teacher(values.momentum)
        mark("EMA")
        logged = {**terms.parts, **{f"grad_norm_{name}": norm for name, norm in result.grad_norms.items()}}
        self.observed = student, outputs, targets[0].let_go()  # the loop keeps them through the next step
        for name, value in logged.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(result.good, value, 0.0)
        mark("log")
        return logged


def now(device: torch.device) -> Any:
    """A point in time: CPU seconds of the process, or an event on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def durations(points: Sequence[Any]) -> list[float]:
    """Seconds between neighbours in a list of points."""
    if isinstance(points[0], float):
        return [end - start for start, end in pairwise(points)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(points)]


class Runner:
    """One side: its count of steps, their losses, the times of its turns."""

    def __init__(self, name: str, cfg: Config, weights: dict[str, Tensor], device: torch.device) -> None:
        self.side = (Ours if name == "ours" else Baseline)(cfg, weights, device)
        self.schedules, self.device = Schedules(cfg), device
        self.losses: list[dict[str, float]] = []
        self.turns: list[dict[str, float]] = []  # seconds a step by part

    def turn(self, batches: Sequence[Batch]) -> None:
        """A step on every batch."""
        names, points, logged = [], [now(self.device)], []

        def mark(name: str) -> None:
            names.append(name)
            points.append(now(self.device))

        for step, batch in enumerate(batches, start=len(self.losses)):
            logged.append(self.side.step(batch, step, self.schedules.at(step), mark))
        parts = dict.fromkeys(names, 0.0)
        for name, seconds in zip(names, durations(points), strict=True):
            parts[name] += seconds / len(batches)
        self.turns.append(parts)
        self.losses += [{name: float(value) for name, value in values.items()} for values in logged]

    def seconds(self) -> list[float]:
        """A step's time in each turn after the first."""
        return [sum(parts.values()) for parts in self.turns[1:]]

    def parts(self) -> dict[str, float]:
        """A step's median time in each part."""
        return {name: median([turn[name] for turn in self.turns[1:]]) for name in self.turns[0]}


def take_turns(runners: Sequence[Runner], batches: Sequence[Batch], repeats: int) -> None:
    """A turn of each side to warm up, then those that count, in random order."""
    order = random.Random(0)
    for _ in range(1 + repeats):
        for runner in order.sample(runners, len(runners)):
            runner.turn(batches)


def peak_memory(name: str, cfg: Config, device: torch.device) -> int:
    """Bytes at the peak of two steps of one side in this process: resident on a CPU, allocated on a GPU."""
    batches = [random_batch(cfg, index).to(device) for index in range(2)]
    Runner(name, cfg, initial_weights(cfg), device).turn(batches)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_in_child(name: str) -> int:
    """`peak_memory` of a fresh process; call it while this one is small, for the child inherits its peak."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


class Cost:
    """Floating-point operations of a step's matrix products, 2 for each multiply-add.

    Student with its backward (twice the forward) on all tokens of all crops, teacher on the global crops; the
    last feed-forward layer and the heads on class tokens and masked patches alone, which is all that the
    losses read. No gradient reaches the images or the matrices of an RMLP.
    Element-wise work, KoLeo and what is computed a second time count nothing.
    """

    def __init__(self, cfg: Config, masked: float) -> None:
        self.cfg, self.model, self.dim = cfg, cfg.model, vit_shape(cfg.model).embed_dim
        local, images, head = cfg.data.local_crops, cfg.data.group_size, cfg.dino_head
        sizes = ((2 * images, GLOBAL_SIZE), (local.number * images, local.size))
        self.groups = [(crops, 1 + (size // cfg.model.patch_size) ** 2) for crops, size in sizes]
        self.tokens = sum(crops * length for crops, length in self.groups)
        self.rows = 2 * images + masked  # of the teacher's head
        hidden = [head.hidden_dim] * (head.num_layers - 1)
        self.widths = [self.dim, *hidden, head.bottleneck_dim, head.prototypes]
        if head.kind == "rmlp":
            self.widths = [*rmlp_widths(self.dim, cfg.rmlp.outputs)]

    def total(self) -> float:
        """Of a step."""
        patch = 2 * self.model.in_channels * self.model.patch_size**2 * self.dim
        embed = [crops * (length - 1) * patch for crops, length in self.groups]
        student = sum(self.blocks(*group, drop=True) for group in self.groups)
        factor = 3 if self.cfg.dino_head.kind == "mlp" else 2
        local = self.groups[1][0]
        rows = factor * (local + self.rows) + self.rows
        head = 2 * sum(n * m for n, m in pairwise(self.widths))
        last = (3 * (local + self.rows) + self.rows) * self.ffn()
        return 3 * student + self.blocks(*self.groups[0]) + 3 * embed[0] + 2 * embed[1] + last + rows * head

    def blocks(self, crops: int, length: int, drop: bool = False) -> float:
        """Forward but for the last feed-forward layer; a token costs 8 D^2 in qkv, proj and 4 N D mixing."""
        kept = [kept_rows(rate, crops) if drop else crops for rate in drop_path_rates(self.model)]
        attention = 8 * self.dim**2 + 4 * length * self.dim
        return length * (sum(kept) * attention + sum(kept[:-1]) * self.ffn())

    def ffn(self) -> float:
        """A token's feed-forward layer."""
        return 2 * (3 if self.model.ffn_layer == "swiglu" else 2) * self.dim * ffn_hidden_dim(self.model)


def matrix_ceiling(cost: Cost, device: torch.device) -> tuple[float, Sequence[int]]:
    """The fastest torch.mm of shapes like the model's, and of a square: operations a second, (m, k, n)."""
    dim, square = cost.dim, 2048 if device.type == "cpu" else 8192
    shapes = [(cost.tokens, dim, 3 * dim), (cost.tokens, dim, 4 * dim), (cost.tokens, 4 * dim, dim)]
    shapes += [(round(cost.rows), *cost.widths[-2:]), (square, square, square)]
    dtype = torch.bfloat16 if cost.cfg.engine.precision == "bf16" else torch.float32
    return max((mm_rate(*shape, dtype, device), shape) for shape in shapes)


def mm_rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of (m, k) @ (k, n), the best of several."""
    left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    out, points = torch.empty(m, n, dtype=dtype, device=device), [now(device)]
    for _ in range(10):
        torch.mm(left, right, out=out)
        points.append(now(device))
    return 2 * m * k * n / min(durations(points))


def measure(options: argparse.Namespace, cfg: Config, device: torch.device) -> Figures:
    """All figures of a run; those in pairs of ours and baseline come out as tables."""
    peaks = {name: peak_memory_in_child(name) / 2**20 for name in SIDES}
    batches = [random_batch(cfg, index) for index in range(options.steps)]
    cost = Cost(cfg, mean(len(batch.mask_indices) for batch in batches))
    ceiling, shape = matrix_ceiling(cost, device)
    weights = initial_weights(cfg)
    sides = {name: Runner(name, cfg, weights, device) for name in SIDES}
    take_turns([*sides.values()], [batch.to(device) for batch in batches], options.repeats)
    times = {name: runner.seconds() for name, runner in sides.items()}
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
        "parts_median_s": {name: runner.parts() for name, runner in sides.items()},
        "losses_of_first_step": {name: runner.losses[0] for name, runner in sides.items()},
        "losses_of_last_step": {name: runner.losses[-1] for name, runner in sides.items()},
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
    gpu = device.type == "cuda"
    return {
        **{name: value for name, value in vars(options).items() if name != "memory_of"},
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "clock": "CUDA events" if gpu else "CPU time of the process",
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
    """Measure and print; the process's exit status."""
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        cfg, device = configuration(options), pick_device(options.device)
    except ValueError as error:
        print(f"step.py: {error}", file=sys.stderr)
        return 2
    if options.memory_of:
        print(peak_memory(options.memory_of, cfg, device))
        return 0
    figures = setting(options, device) | measure(options, cfg, device)
    for name, value in figures.items():
        print(table(name, **value) if isinstance(value, dict) else f"{name}: {value}")
    print(f"\n{json.dumps(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
