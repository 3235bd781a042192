"""One loss curve: the same few steps under every engine, by the command line, on real images.

    python benchmarks/engines.py               # single, ddp, fsdp2, hybrid sharding, DeepSpeed ZeRO 1 to 3
    python benchmarks/engines.py --only single ddp --head rmlp

Global batch and group size are the same everywhere, so all differences are those of the order of sums (drop
path 0.3, Sinkhorn, registers, fp32). Ranks are processes on this machine's CPU. Prints a table in Markdown;
the last line is one JSON object.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from arguments import at_least

from pretrain.command_line import Parser, exit_status
from pretrain.data.digits import write_digits

ROOT = Path(__file__).parents[1]
GROUPS, GROUP = 4, 4  # a batch of 16 images


class Layout(NamedTuple):
    """An engine on a number of ranks."""

    name: str
    ranks: int
    settings: tuple[str, ...]


LAYOUTS = (
    Layout("single", 1, ("engine.kind=single",)),
    Layout("ddp", 2, ("engine.kind=ddp",)),
    Layout("fsdp2", 2, ("engine.kind=fsdp2",)),
    Layout("fsdp2_2x2", 4, ("engine.kind=fsdp2", "engine.fsdp2.replicate=2")),
    *(
        Layout(f"zero{stage}", 2, ("engine.kind=deepspeed", f"engine.deepspeed.stage={stage}"))
        for stage in (1, 2, 3)
    ),
)
RMLP = (
    *("dino_head.kind=rmlp", "ibot_head.kind=rmlp", "rmlp.outputs=64"),
    *("loss.centering=softmax", "teacher.warmup_temp=0.07"),
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="engines.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [layout.name for layout in LAYOUTS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--head", choices=["mlp", "rmlp"], default="mlp", help="projection head (default mlp)"
    )
    parser.add_argument("--steps", type=at_least(1), default=8, help="default 8")
    return parser.parse_args()


def command(layout: Layout, folder: Path, steps: int, head: str) -> list[str]:
    """Train the debugging recipe on the digits."""
    settings = [
        *(f"run.dir={folder / layout.name}", f"run.steps={steps}", f"data.shards=[{folder}/train-*.tar]"),
        *("data.workers=0", f"data.group_size={GROUP}", f"optim.global_batch_size={GROUP * GROUPS}"),
        *(f"engine.accumulation_steps={GROUPS // layout.ranks}", "optim.warmup_steps=2", "log.every=1"),
        *("model.layer_scale=1.0", "model.drop_path_rate=0.3", "engine.precision=fp32", "engine.device=cpu"),
        *("log.tensorboard=false", "log.knn.train=[]", "log.knn.test=[]", f"checkpoint.every={steps}"),
        *(RMLP if head == "rmlp" else ()),
    ]
    config = str(ROOT / "configs" / "debug_cpu.yaml")
    return [sys.executable, "-m", "pretrain", config, *settings, *layout.settings]


def run(layout: Layout, folder: Path, steps: int, head: str) -> list[dict[str, Any]]:
    """Train on all ranks; the lines of metrics.jsonl."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(layout.ranks):
        ranks = {"RANK": rank, "WORLD_SIZE": layout.ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        place = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in ranks.items()}}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(place if layout.ranks > 1 else {})}
        arguments = command(layout, folder, steps, head)
        processes.append(subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL))
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit(f"engines.py: {layout.name} ended with {statuses}")
    return [json.loads(line) for line in (folder / layout.name / "metrics.jsonl").read_text().splitlines()]


def table(curves: dict[str, list[float]]) -> str:
    """Losses by step, a column an engine, and the largest relative difference to the first one."""
    reference = next(iter(curves.values()))
    rows = [["step", *curves], ["---", *["--:"] * len(curves)]]
    rows += [[str(i + 1), *(f"{curve[i]:.6f}" for curve in curves.values())] for i in range(len(reference))]
    rows.append(["largest difference", *(f"{difference(curve, reference):.0e}" for curve in curves.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def difference(curve: list[float], reference: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a / b - 1) for a, b in zip(curve, reference, strict=True))


def main() -> int:
    """Run, print."""
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digits(folder)
        chosen = [layout for layout in LAYOUTS if layout.name in options.only]
        lines = {layout.name: run(layout, folder, options.steps, options.head) for layout in chosen}
    curves = {name: [line["loss/total"] for line in found] for name, found in lines.items()}
    print(f"\n{table(curves)}\n")
    reference = next(iter(curves.values()))
    gaps = {name: difference(curve, reference) for name, curve in curves.items()}
    print(json.dumps({"head": options.head, "loss": curves, "largest_relative_difference": gaps}))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("engines.py", main))
