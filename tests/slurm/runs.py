"""Small runs on the virtual cluster: their config, their launch as a person does it, and what they leave."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pretrain.cluster.history import Attempt, read_history
from pretrain.cluster.job_folder import JobFolder, newest_job
from pretrain.records import read_records
from tests.slurm.virtual_cluster import VirtualCluster

ROOT = Path(__file__).parents[2]
STEPS = 24

EVENT = """\
import importlib.machinery, os, sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "pretrain.train":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), change(module))
        return spec

def change(module):
    real = module.train_step
    def train_step(run, step, *rest):
        {event}
        return real(run, step, *rest)
    module.train_step = train_step

if os.environ.get("SLURM_PROCID") in {ranks}:
    sys.meta_path.insert(0, Finder())
"""


def write_config(folder: Path, shards: Path, **cluster: Any) -> Path:
    """The demo's tiny model for a few steps, on 2 machines x 2 processes."""
    path = folder / "tiny.yaml"
    setup = ["export OMP_NUM_THREADS=1", *cluster.pop("setup", [])]
    content = {
        "base": str(ROOT / "configs/demo.yaml"),
        "run": {"dir": str(folder / "run"), "steps": STEPS},
        "data": {"shards": [str(shards / "train-*.tar")], "group_size": 32},
        "optim": {"warmup_steps": 5, "lr": 2e-4},  # small: rounding must not grow within the run
        "engine": {"kind": "ddp"},
        "checkpoint": {"every": 5},
        "log": {"every": 1, "knn": {"train": [], "test": [], "every": 0}},
        "cluster": {
            "nodes": 2,
            "gpus_per_node": 2,
            "cpus_per_task": 2,
            "time": "10",
            "signal_seconds": 30,
            "min_free_gb": 0.1,
            "preflight_timeout": 60,
            **cluster,
            "setup": setup,
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def write_fault(folder: Path, *attempts: int) -> str:
    """Let rank 1 fail at step 7 of these attempts; a line for cluster.setup."""
    numbers = [str(number) for number in attempts]
    event = f"""if step == 7 and os.environ["PRETRAIN_ATTEMPT"] in {numbers}:
            raise RuntimeError("this step fails")"""
    return _write_event(folder, event, ["1"])


def write_pause(folder: Path, seconds: float) -> str:
    """Let every step take this much longer; a line for cluster.setup."""
    return _write_event(folder, f"time.sleep({seconds})", ["0", "1", "2", "3"])


def _write_event(folder: Path, event: str, ranks: list[str]) -> str:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(EVENT.format(event=event, ranks=ranks))
    return f"export PYTHONPATH={folder}"


@dataclass
class Shell:
    """A shell of a person: commands with the cluster's environment, in a folder of their own."""

    cluster: VirtualCluster | None
    folder: Path

    def environment(self) -> dict[str, str]:
        slurm = self.cluster.environment if self.cluster else {}
        return {**os.environ, **slurm, "XDG_CONFIG_HOME": str(self.folder), "OMP_NUM_THREADS": "1"}

    def run(self, script: str, *arguments: str | Path, status: int = 0) -> str:
        """What a launcher prints; its exit status must be the given one."""
        done = subprocess.run(
            [sys.executable, ROOT / "launchers" / script, *arguments],
            env=self.environment(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def launch(self, *arguments: str | Path) -> str:
        """The number of the job that the launcher sends."""
        printed = self.run("slurm.py", *arguments)
        return next(line.split()[1] for line in printed.splitlines() if line.startswith("job "))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def step_of(run_dir: Path) -> int:
    """The last step that the metrics tell of."""
    lines = metrics(run_dir)
    return lines[-1]["step"] if lines else 0


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss/total"] for line in metrics(run_dir)}


def attempts_of(run_dir: Path) -> list[Attempt]:
    return read_history(newest_job(run_dir))


def pid_of(folder: JobFolder, rank: int, attempt: int = 0) -> int:
    return read_records(folder.attempt(attempt))[rank].pid


def weights(run_dir: Path, step: int = STEPS) -> dict[str, Tensor]:
    """All that the last checkpoint holds, student, teacher and optimizer, by name."""
    found: dict[str, Tensor] = {}
    for part in ("model", "optim"):
        whole = run_dir / f"{part}.pt"
        dcp_to_torch_save(run_dir / "checkpoints" / f"step_{step:08d}" / part, whole)
        found |= dict(_flat(torch.load(whole, weights_only=True), part))
    return found


def _flat(tree: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in _flat(value, f"{name}.{key}")]
    return [(name, tree)] if isinstance(tree, Tensor) else []


def assert_same_end(run_dir: Path, reference: Path, step: int = STEPS) -> None:
    """Bit for bit the same checkpoint after the last step, and the same curve."""
    ours, theirs = weights(run_dir, step), weights(reference, step)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert losses(run_dir) == losses(reference)
