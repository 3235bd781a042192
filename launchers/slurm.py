"""Send a run to a Slurm cluster.

    python launchers/slurm.py --nodes 4 configs/vitl_rmlp.yaml optim.lr=1e-3

Everything that can be known before is checked before: the config, the batch on so many devices, the shards,
the folder, and what sbatch says. The job saves and goes on after the time limit, preemption and failures; see
docs/slurm.md, and launchers/jobs.py to watch it. Exit status 2: nothing was sent or written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pretrain.cluster import submit
from pretrain.cluster.checks import check_run, check_with_slurm
from pretrain.cluster.cost import estimate
from pretrain.cluster.layout import fitted, user_file
from pretrain.command_line import STOPPED, Parser, exit_status
from pretrain.config.checks import warnings
from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.job import Task

# option -> what argparse is told; each sets the key of section cluster that has its name
OPTIONS: dict[str, dict[str, Any]] = {
    "--nodes": {"type": int, "help": "machines"},
    "--gpus-per-node": {"type": int, "help": "GPUs of each, 0 = CPU machines"},
    "--tasks-per-node": {"type": int, "help": "processes on each (default: one per GPU)"},
    "--cpus-per-task": {"type": int, "help": "cores of a process (default: data.workers + 2)"},
    "--partition": {"help": "default: the cluster's"},
    "--account": {"help": "that pays"},
    "--qos": {"help": "quality of service"},
    "--time": {"help": "limit of an attempt, such as 2-00:00:00; the run goes on after it"},
    "--constraint": {"help": "features of the machines"},
    "--exclude": {"help": "machines not to use"},
    "--dependency": {"help": "of other jobs, such as afterok:1234"},
    "--mail": {"help": "address that hears of begin, end, failure and requeue"},
    "--name": {"help": "of the job (default: the name of the run's folder)"},
    "--container-image": {"help": "image that the processes run in (needs pyxis)"},
    "--setup": {"action": "append", "help": "shell line before the start, as 'module load cuda'; repeatable"},
    "--images-per-s": {"type": float, "help": "measured speed of one GPU, for the estimate of GPU-hours"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, show or send the run; the exit status."""
    options = _parse(arguments)
    cfg, changes = fitted(_config(options))
    done = check_run(cfg)
    script = submit.draft(cfg)
    starts = check_with_slurm(cfg, script) if options.cluster == "slurm" else ""
    for line in warnings(cfg):
        print(f"slurm.py: warning: {line}", file=sys.stderr)
    if options.dry_run:
        print(script, end="")
    print(*(f"# {line}" for line in filter(None, [*changes, estimate(cfg, done), starts])), sep="\n")
    return 0 if options.dry_run else _send(cfg, options.cluster)


def _send(cfg: Config, cluster: Literal["slurm", "local", "debug"]) -> int:
    """Start the job and say where to look."""
    if cluster == "slurm":
        sent = submit.submit(cfg, Task)
    else:
        sent = submit.submit_here(cfg, lambda folder: Task(folder, own_log=cluster != "debug"), cluster)
    run_dir = cfg.run.dir
    print(f"job {sent.job_id} in {sent.folder.path}")
    print(f"watch:   python launchers/jobs.py status {run_dir}")
    print(f"output:  python launchers/jobs.py logs -f {run_dir}")
    print(f"curves:  tensorboard --logdir {run_dir}")
    return 0 if sent.status == STOPPED else sent.status


def _config(options: argparse.Namespace) -> Config:
    """The config with what the command line says on top, and the person's own defaults below."""
    cluster = {name: getattr(options, name) for name in map(_key, OPTIONS)}
    given: dict[str, dict[str, Any]] = {"cluster": {k: v for k, v in cluster.items() if v is not None}}
    if options.run_dir is not None:
        given["run"] = {"dir": options.run_dir}
    return load_config(Path(options.config), options.overrides, user_file(), given)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; its section cluster holds defaults")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings to change")
    for name, told in OPTIONS.items():
        parser.add_argument(name, **told)
    parser.add_argument("--run-dir", help="folder of the run (run.dir)")
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm", help=CLUSTER_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, send nothing")
    return parser.parse_intermixed_args(arguments)


CLUSTER_HELP = "local: in the background of this machine; debug: in this process"


def _key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


if __name__ == "__main__":
    sys.exit(exit_status("slurm.py", main))
