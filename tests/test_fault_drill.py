"""`make drill`: a run is killed 50 times at random moments, and meets a full and a read-only disk.

The disks are real ones in memory, which only root can mount.
"""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.config.load import load_config, save_config
from pretrain.run.checkpoint_folder import newest_checkpoint
from pretrain.run.tensors import read_tensors
from tests.rank_processes import ROOT, ended, start_ranks

pytestmark = [pytest.mark.drill, pytest.mark.dist]

STEPS, KILLS, SEED = 600, 50, 0
MOST_STEPS = 16  # from a start to its kill


def config(shards: Path, run: Path) -> str:
    """The path of a config: asynchronous checkpoints every 5 steps, drop path, Sinkhorn, registers."""
    settings = [
        *(f"run.dir={run}", f"run.steps={STEPS}", f"data.shards=[{shards}/train-*.tar]"),
        *("engine.kind=ddp", "engine.accumulation_steps=1", "data.workers=1", "data.group_size=4"),
        *("optim.global_batch_size=8", "optim.warmup_steps=2", "checkpoint.every=5", "log.every=1"),
        *("engine.timeout=30", "engine.hang_timeout=20", "checkpoint.asynchronous=true"),
        *("log.tensorboard=false", "log.knn.train=[]", "log.knn.test=[]"),
    ]
    path = run.with_suffix(".yaml")
    save_config(load_config(ROOT / "configs" / "debug_cpu.yaml", settings), path)
    return str(path)


def weights(run: Path) -> dict[str, Tensor]:
    """Everything in the last checkpoint: both branches, method, optimizer."""
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None and newest.name == f"step_{STEPS:08d}"
    return {
        f"{part}/{k}": v for part in ("model", "optim") for k, v in read_tensors(newest / part, "").items()
    }


def to_the_end(path: str, folder: Path) -> None:
    for rank in ended(start_ranks(["-m", "pretrain", path], folder), folder):
        assert rank.status == 0, rank.err


def killed(path: str, folder: Path, steps: int, seconds: float, rank: int) -> None:
    """Start, and kill one rank some steps and seconds later; the other one ends by itself."""
    run = Path(path).with_suffix("")
    lock, started, before = run / "run.lock", time.time(), lines(run)
    processes = start_ranks(["-m", "pretrain", path], folder)
    while not lock.exists() or lock.stat().st_mtime < started or lines(run) < before + steps:
        assert all(process.poll() is None for process in processes), (folder / "0.err").read_text()
        time.sleep(0.01)
    time.sleep(seconds)
    processes[rank].kill()
    statuses = [process.status for process in ended(processes, folder)]
    assert statuses[rank] == -9 and statuses[1 - rank] == 3, (folder / f"{1 - rank}.err").read_text()


def lines(run: Path) -> int:
    """Metric lines of a run, one a step."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_fifty_kills_end_in_the_weights_of_an_undisturbed_run(shards: Path, tmp_path: Path) -> None:
    draw = random.Random(SEED)
    hurt, reached = config(shards, tmp_path / "hurt"), []
    for _ in range(KILLS):
        steps, seconds, rank = draw.randrange(MOST_STEPS), draw.uniform(0, 0.3), draw.randrange(2)
        killed(hurt, tmp_path, steps, seconds, rank)
        newest = newest_checkpoint(tmp_path / "hurt" / "checkpoints")
        reached.append(int(newest.name.removeprefix("step_")) if newest else 0)
    assert reached == sorted(reached)  # nothing that was saved is lost
    to_the_end(hurt, tmp_path)
    to_the_end(config(shards, tmp_path / "whole"), tmp_path)
    mine, undisturbed = weights(tmp_path / "hurt"), weights(tmp_path / "whole")
    assert mine.keys() == undisturbed.keys()
    assert [name for name, value in undisturbed.items() if not torch.equal(value, mine[name])] == []
    print(f"{KILLS} kills, checkpoints at {reached}")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory on a folder."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def start(path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain", path, "engine.kind=single", "run.steps=20"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(shards: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=2m") as disk:
        hurt = config(shards, disk / "run")
        full = start(hurt)
        assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
        assert "No space left on device" in full.stderr
        newest = newest_checkpoint(disk / "run" / "checkpoints")
        assert newest is not None and int(newest.name.removeprefix("step_")) < STEPS
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert start(hurt).returncode == 0
        mine = {
            k: v.clone() for k, v in read_tensors(disk / "run/checkpoints/step_00000020/model", "").items()
        }
    whole = config(shards, tmp_path / "whole")
    assert start(whole).returncode == 0
    undisturbed = read_tensors(tmp_path / "whole/checkpoints/step_00000020/model", "")
    assert [name for name, value in undisturbed.items() if not torch.equal(value, mine[name])] == []


def test_a_read_only_disk_is_one_line_before_training(shards: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        path = config(shards, tmp_path / "run")
        refused = subprocess.run(
            [sys.executable, "-m", "pretrain", path, "engine.kind=single", f"run.dir={disk}/run"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert "cannot be used as a run folder" in refused.stderr and "Read-only" in refused.stderr
