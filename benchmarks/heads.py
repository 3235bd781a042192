"""Forward and backward of the projection heads: trainable MLP, our randomized one, a plain randomized one.

    python benchmarks/heads.py
    python benchmarks/heads.py --outputs 64 --rows 8 --repeats 2     # takes a second

A step is one or more calls on the same rows (the micro-batches of a step), each forward to the logits and
backward from a fixed gradient. Ours draws its weights once a step: normal numbers, or signs (rademacher). The
plain head does what the definition says: at every call normal numbers from the CPU's generator, and the
identity as a matrix that is added. Of the MLP head the weights' gradients count, but neither optimizer nor
EMA, which the others do not need.

Sides take turns in random order in one process. Times are CPU seconds of the process; they hold the page
faults of large tensors, unless MALLOC_MMAP_MAX_=0 and a huge MALLOC_TRIM_THRESHOLD_ make the C library keep
its memory. The last line of the output is one JSON object. Needs torch, numpy and omegaconf only; where the
package is not installed, run in the repository's root with PYTHONPATH=. set.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from arguments import at_least
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from pretrain.command_line import Parser, exit_status
from pretrain.config.derived import ARCHITECTURES, rmlp_widths
from pretrain.config.schema import HeadConfig, RmlpConfig, RmlpInit
from pretrain.heads import MlpHead, RmlpHead
from pretrain.models.init import init_weights
from pretrain.seeding import torch_stream

AMPLITUDE = 5.0
OURS, SIGNS, PLAIN, MLP = "ours", "ours, signs", "plain", "mlp"
Call = Callable[[Tensor], Tensor]  # rows (n, D) to logits (n, K)
Figures = dict[str, Any]


def parse() -> argparse.Namespace:
    """The command line."""
    raw, positive = argparse.RawDescriptionHelpFormatter, at_least(1)
    parser = Parser(prog="heads.py", description=__doc__, formatter_class=raw, allow_abbrev=False)

    def add(name: str, default: object, text: str, **rest: Any) -> None:
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})", **rest)

    add("arch", "vit_small", "backbone that gives the widths", choices=sorted(ARCHITECTURES))
    add("outputs", [65_536, 4_096], "K", type=positive, nargs="+", metavar="K")
    add(
        "rows", 352, "tokens of a call; 4 images of ViT-S/14 have about that many", type=positive, metavar="N"
    )
    add("calls", [1, 4], "calls a step", type=positive, nargs="+", metavar="N")
    add("precision", "fp32", "bf16 means autocast", choices=["fp32", "bf16"])
    add("repeats", 5, "turns of each side after a warm-up turn", type=positive, metavar="N")
    add("threads", 1, "threads", type=positive, metavar="N")
    return parser.parse_args()


def plain_logits(x: Tensor, widths: tuple[int, ...], noise: Callable[[int, int], Tensor]) -> Tensor:
    """The definition, word by word; `noise(n, m)` draws a layer's normal numbers."""
    last = len(widths) - 2
    for index, (n, m) in enumerate(pairwise(widths)):
        weight = torch.eye(n, m) + AMPLITUDE / m * noise(n, m)
        x = x @ weight
        x = x if index == last else gelu(x)
    return x.float()


class Side:
    """A head, how it begins a step, and the times of its turns."""

    def __init__(self, call: Call, begin_step: Callable[[int], object]) -> None:
        self.call, self.begin_step = call, begin_step
        self.seconds: list[float] = []
        self.step = 0

    def turn(self, rows: Tensor, gradient: Tensor, calls: int, precision: str) -> None:
        """One step."""
        start = time.process_time()
        self.begin_step(self.step)
        for _ in range(calls):
            x = rows.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = self.call(x)
            logits.backward(gradient)
        self.seconds.append(time.process_time() - start)
        self.step += 1


def randomized(dim: int, outputs: int, init: RmlpInit) -> RmlpHead:
    """Our head for one loss of the student."""
    cfg = RmlpConfig(outputs=outputs, amplitude=AMPLITUDE, init=init)
    return RmlpHead(dim, cfg, 0, "dino", "student")


def build_sides(dim: int, outputs: int) -> dict[str, Side]:
    """The sides at one size."""
    mlp = MlpHead(dim, HeadConfig(prototypes=outputs))
    init_weights(mlp, 0)
    ours, signs = randomized(dim, outputs, "gaussian"), randomized(dim, outputs, "rademacher")
    widths = rmlp_widths(dim, outputs)
    return {
        MLP: Side(lambda x: mlp(x).logits(), lambda step: mlp.zero_grad(set_to_none=True)),
        OURS: Side(lambda x: ours(x).logits(), ours.begin_step),
        SIGNS: Side(lambda x: signs(x).logits(), signs.begin_step),
        PLAIN: Side(lambda x: plain_logits(x, widths, torch.randn), lambda step: None),
    }


def largest_difference(rows: Tensor, outputs: int) -> float:
    """Between ours and plain logits from the same normal numbers, relative to the largest logit."""
    dim = rows.shape[1]
    ours = randomized(dim, outputs, "gaussian")
    ours.begin_step(0)
    layers = iter(range(4))

    def noise(n: int, m: int) -> Tensor:
        return torch.randn(n, m, generator=torch_stream(0, "rmlp", "dino", "student", next(layers), 0))

    mine, theirs = ours(rows).logits(), plain_logits(rows, rmlp_widths(dim, outputs), noise)
    return float((mine - theirs).abs().max() / theirs.abs().max())


def measure(options: argparse.Namespace, outputs: int, calls: int) -> Figures:
    """Times at one size, and their ratios turn by turn."""
    dim = ARCHITECTURES[options.arch][0]
    stream = torch_stream(0, "benchmark")
    rows = layer_norm(torch.randn(options.rows, dim, generator=stream), (dim,))
    gradient = torch.randn(options.rows, outputs, generator=stream) / options.rows
    sides, order = build_sides(dim, outputs), random.Random(0)
    for _ in range(1 + options.repeats):
        for side in order.sample([*sides.values()], len(sides)):
            side.turn(rows, gradient, calls, options.precision)
    times = {name: side.seconds[1:] for name, side in sides.items()}
    return {
        "outputs": outputs,
        "calls_per_step": calls,
        "cpu_s_per_step": {name: spread(values) for name, values in times.items()},
        "mlp_over_ours": ratio(times[MLP], times[OURS]),
        "mlp_over_ours_with_signs": ratio(times[MLP], times[SIGNS]),
        "plain_over_ours": ratio(times[PLAIN], times[OURS]),
        "largest_relative_difference_of_plain": largest_difference(rows, outputs),
    }


def spread(values: list[float]) -> Figures:
    """Median and range."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratio(theirs: list[float], own: list[float]) -> Figures:
    """Of the medians, and the range of the turns' ratios."""
    turns = [a / b for a, b in zip(theirs, own, strict=True)]
    return {"of_medians": median(theirs) / median(own), "min": min(turns), "max": max(turns)}


def line(figures: Figures) -> str:
    """The figures of one size as a row."""
    times = [f"{value['median']:.3f}" for value in figures["cpu_s_per_step"].values()]
    ratios = [figures["mlp_over_ours"], figures["plain_over_ours"]]
    shown = [f"{r['of_medians']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in ratios]
    return (
        "| " + " | ".join([f"{figures['outputs']:,}", str(figures["calls_per_step"]), *times, *shown]) + " |"
    )


def main() -> int:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    print("| K | calls | mlp, s | ours, s | with signs, s | plain, s | mlp / ours | plain / ours |")
    print("|" + "--:|" * 8)
    sizes = []
    for outputs in options.outputs:
        for calls in options.calls:
            sizes.append(measure(options, outputs, calls))
            print(line(sizes[-1]), flush=True)
    facts = {
        **vars(options),
        "clock": "CPU time of the process",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(f"\n{json.dumps({**facts, 'sizes': sizes})}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("heads.py", main))
