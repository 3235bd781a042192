"""Train on this machine, on all its GPUs or on several CPU processes.

    python launchers/local.py configs/vitl_rmlp.yaml --gpus 8
    python launchers/local.py configs/demo.yaml --procs 2 data.group_size=64

The run folder, the copy of the code, the logs, and the restarts after a failure are those of a Slurm job;
what rank 0 prints is shown. Ctrl-C saves and ends; the same command continues.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.cluster import submit
from pretrain.cluster.checks import check_run
from pretrain.cluster.layout import fitted, tasks_per_node, user_file
from pretrain.cluster.supervise import Supervisor
from pretrain.command_line import Parser, exit_status
from pretrain.config.checks import warnings
from pretrain.config.load import load_config
from pretrain.config.schema import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status."""
    options = _parse(arguments)
    cfg, changes = fitted(_config(options))
    check_run(cfg)
    print(*changes, sep="\n", end="\n" if changes else "")
    for line in warnings(cfg):
        print(f"local.py: warning: {line}", file=sys.stderr)
    folder, cfg, code = submit.prepare(cfg, "torchrun")
    print(f"job in {folder.path}")
    print(f"curves:  tensorboard --logdir {cfg.run.dir}", flush=True)
    return Supervisor(folder, code, tasks_per_node(cfg.cluster)).run()


def _config(options: argparse.Namespace) -> Config:
    """The config with the processes of this machine in section cluster."""
    given: dict[str, Any] = {"dir": options.run_dir} if options.run_dir is not None else {}
    cfg = load_config(Path(options.config), options.overrides, user_file(), {"run": given})
    engine, count = cfg.engine, options.procs or options.gpus or _default(cfg)
    if options.procs:
        engine = replace(engine, device="cpu")
    gpus = 0 if options.procs or engine.device == "cpu" else count
    cluster = replace(cfg.cluster, nodes=1, gpus_per_node=gpus, tasks_per_node=count, dependency="")
    return replace(cfg, engine=engine, cluster=cluster)


def _default(cfg: Config) -> int:
    """All GPUs that the driver shows, or one process."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return 1 if cfg.engine.device == "cpu" else max(gpus, 1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings to change")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--gpus", type=_count, help="processes, one per GPU (default: all GPUs)")
    number.add_argument("--procs", type=_count, help="processes on the CPU")
    parser.add_argument("--run-dir", help="folder of the run (run.dir)")
    return parser.parse_intermixed_args(arguments)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)


if __name__ == "__main__":
    sys.exit(exit_status("local.py", main))
