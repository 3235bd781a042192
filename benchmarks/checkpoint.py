"""How long training stands still for a checkpoint: saved at once, and copied and written behind training.

    python benchmarks/checkpoint.py --folder /path/on/the/disk/to/measure
    python benchmarks/checkpoint.py --arch vit_small --ranks 2 --repeats 1 --steps 2

The state is that of a backbone without heads: student, teacher and the two moments of AdamW in fp32, plain in
one process, sharded over several. After each save steps of training, matrix products on every rank and a sum
over ranks, run until it is written, and then a few more. The two ways take turns after a warm-up turn.
Standstill is the time of the call that saves; a step beside a write is compared with one beside none. The
last line is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from arguments import at_least
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pretrain.command_line import Parser, exit_status
from pretrain.config.schema import ModelConfig
from pretrain.models.vit import VisionTransformer
from pretrain.run.checkpoint import Checkpoints

GIVE_UP_SECONDS = 600  # a save that is not written by then has failed: waiting for it tells why
TINY: dict[str, Any] = {"arch": "custom", "embed_dim": 64, "depth": 2, "num_heads": 2}
WAYS = ("at once", "behind training")
State = dict[str, dict[str, Tensor]]
Figures = dict[str, Any]


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="checkpoint.py", description=__doc__, formatter_class=raw)
    parser.add_argument("--arch", default="vit_base", choices=["tiny", "vit_small", "vit_base", "vit_large"])
    for name, default, text in (
        ("--ranks", 1, "processes; more than one share the state"),
        ("--repeats", 5, "saves of each way after a warm-up"),
        ("--steps", 10, "steps between saves, at least"),
    ):
        parser.add_argument(name, type=at_least(1), default=default, help=f"{text} (default {default})")
    parser.add_argument("--folder", type=Path, help="to write into (default: the system's temporary folder)")
    return parser.parse_args()


def build_state(arch: str, sharded: bool) -> State:
    """Names, shapes and dtypes of a run's state; the values are noise."""
    model_config = ModelConfig(**TINY) if arch == "tiny" else ModelConfig(arch=arch)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in VisionTransformer(model_config).state_dict().items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None

    def tensor(shape: torch.Size) -> Tensor:
        plain = torch.randn(shape)
        return plain if mesh is None else distribute_tensor(plain, mesh, [Shard(0)])

    model = {f"{b}.backbone.{k}": tensor(s) for b in ("student", "teacher") for k, s in shapes.items()}
    optim = {f"backbone.{k}.{m}": tensor(s) for k, s in shapes.items() for m in ("exp_avg", "exp_avg_sq")}
    return {"model": model, "optim": optim}


def train_step(work: Tensor) -> float:
    """Seconds of about 50 GFLOP of matrix products, of which all ranks end together."""
    since = time.perf_counter()
    for _ in range(6):
        work @ work
    if dist.is_initialized():
        dist.all_reduce(torch.ones(1))
    return time.perf_counter() - since


def turn(checkpoints: Checkpoints, state: State, step: int, work: Tensor, steps: int) -> Figures:
    """One save, steps until it is written, and as many steps beside nothing."""
    if dist.is_initialized():
        dist.barrier()
    since = time.perf_counter()
    path = checkpoints.save(step, state, {}, {})
    standstill = time.perf_counter() - since
    beside = []
    while not agreed(path.exists) and time.perf_counter() < since + GIVE_UP_SECONDS:
        beside.append(train_step(work))
    written = time.perf_counter() - since
    checkpoints.finish()
    alone = [train_step(work) for _ in range(steps)]
    return {
        "standstill_s": standstill,
        "written_after_s": written,
        "step_beside_write_s": median(beside) if beside else None,
        "step_alone_s": median(alone),
    }


def agreed(condition: Callable[[], bool]) -> bool:
    """Rank 0's answer."""
    answer = torch.tensor(int(condition()))
    if dist.is_initialized():
        dist.broadcast(answer, 0)
    return bool(answer)


def measure(options: argparse.Namespace, folder: Path) -> Figures:
    """Turns of both ways, and their medians; the first turn of each is not counted."""
    state = build_state(options.arch, sharded=options.ranks > 1)
    numbers = [
        tensor.numel() * tensor.element_size() for named in state.values() for tensor in named.values()
    ]
    work = torch.randn(1600, 1600)
    ways = {way: Checkpoints(folder / way, 1, 0, asynchronous=way != WAYS[0]) for way in WAYS}
    turns: dict[str, list[Figures]] = {way: [] for way in WAYS}
    for step in range(1, options.repeats + 2):
        for way, checkpoints in ways.items():
            turns[way].append(turn(checkpoints, state, step, work, options.steps))
    return {
        "arch": options.arch,
        "ranks": options.ranks,
        "state_gb": sum(numbers) / 1e9,
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        **{way: summary(values[1:]) for way, values in turns.items()},
    }


def summary(turns: list[Figures]) -> Figures:
    """Medians over turns, and all standstills."""
    medians = {name: median(turn[name] for turn in turns) for name in turns[0] if turns[0][name] is not None}
    return {**medians, "standstill_of_each_turn_s": [round(turn["standstill_s"], 3) for turn in turns]}


def rank_main(rank: int, options: argparse.Namespace, folder: Path) -> None:
    """One rank of several; rank 0 prints."""
    torch.set_num_threads(1)
    if options.ranks > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.ranks)
    figures = measure(options, folder)
    if rank == 0:
        print("\n".join(table(figures)))
        print(json.dumps(figures))
    if options.ranks > 1:
        dist.destroy_process_group()


def table(figures: Figures) -> list[str]:
    """A row for each figure, a column for each way."""
    names = [name for name in figures[WAYS[1]] if name.endswith("_s") and "each" not in name]
    head = f"{figures['arch']}, {figures['state_gb']:.2f} GB, ranks: {figures['ranks']}"
    lines = [head, f"| medians | {WAYS[0]} | {WAYS[1]} |", "|---|--:|--:|"]
    for name in names:
        cells = [figures[way].get(name) for way in WAYS]
        lines.append("| " + " | ".join([name, *("-" if c is None else f"{c:.3f}" for c in cells)]) + " |")
    return lines


def run() -> int:
    """Measure in a folder that is removed afterwards."""
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.ranks == 1:
            rank_main(0, options, Path(folder))
        else:
            torch.multiprocessing.spawn(rank_main, (options, Path(folder)), options.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("checkpoint.py", run))
