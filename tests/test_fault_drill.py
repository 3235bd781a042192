"""`make drill`: 50 random kills, a full disk, a read-only one, and the memory limit.

The disks are real ones in memory, the limit is that of a control group: only root can make them.
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
from pretrain.processes import children
from pretrain.run.checkpoint_folder import newest_checkpoint
from pretrain.run.tensors import read_tensors
from tests.rank_processes import ROOT, ended, start_ranks

pytestmark = [pytest.mark.drill, pytest.mark.dist]

STEPS, KILLS, SEED = 600, 50, 0
MOST_STEPS = 16  # from a start to its kill
FEW_STEPS = 60  # of a run in one process


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
    """Everything in the newest checkpoint: both branches, method, optimizer; copied, not mapped."""
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    step = torch.tensor(int(newest.name.removeprefix("step_")))
    parts = {part: read_tensors(newest / part, "") for part in ("model", "optim")}
    return {"step": step} | {
        f"{part}/{k}": v.clone() for part, named in parts.items() for k, v in named.items()
    }


def assert_equal(mine: dict[str, Tensor], undisturbed: dict[str, Tensor], steps: int) -> None:
    assert undisturbed["step"] == steps and mine.keys() == undisturbed.keys()
    assert [name for name, value in undisturbed.items() if not torch.equal(value, mine[name])] == []


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
    assert_equal(weights(tmp_path / "hurt"), weights(tmp_path / "whole"), STEPS)
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


def alone(path: str, *settings: str) -> list[str]:
    """The command that trains in one process."""
    return [sys.executable, "-m", "pretrain", path, "engine.kind=single", f"run.steps={FEW_STEPS}", *settings]


def start(path: str, *settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(alone(path, *settings), cwd=ROOT, capture_output=True, text=True, timeout=300)


def undisturbed(shards: Path, folder: Path) -> dict[str, Tensor]:
    """What such a run ends with where nothing happens."""
    assert start(config(shards, folder / "whole")).returncode == 0
    return weights(folder / "whole")


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(shards: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=2m") as disk:
        hurt = config(shards, disk / "run")
        full = start(hurt)
        assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
        assert "No space left on device" in full.stderr
        newest = newest_checkpoint(disk / "run" / "checkpoints")
        assert newest is not None and int(newest.name.removeprefix("step_")) < FEW_STEPS
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert start(hurt).returncode == 0
        mine = weights(disk / "run")
    assert_equal(mine, undisturbed(shards, tmp_path), FEW_STEPS)


def test_a_read_only_disk_is_one_line_before_training(shards: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        path = config(shards, tmp_path / "run")
        refused = start(path, f"run.dir={disk}/run")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert "cannot be used as a run folder" in refused.stderr and "Read-only" in refused.stderr


@contextmanager
def memory_limit(name: str) -> Iterator[Path]:
    """A control group that has no page left for what its processes ask for."""
    base = Path("/sys/fs/cgroup")
    group = (base / "memory" if (base / "memory").is_dir() else base) / name
    group.mkdir()
    try:
        first_version = group / "memory.limit_in_bytes"
        (first_version if first_version.exists() else group / "memory.max").write_text("4096")
        yield group
    finally:
        group.rmdir()


def loader_worker(pid: int) -> int | None:
    """The first worker of a run's loader: a child of its fork server."""
    workers = [child for server in children(pid) for child in children(server)]
    return min(workers, default=None)


def test_a_loader_worker_killed_by_the_memory_limit_is_replaced(shards: Path, tmp_path: Path) -> None:
    hurt = config(shards, tmp_path / "hurt")
    with (
        memory_limit(f"pretrain_drill_{tmp_path.name}") as group,
        subprocess.Popen(alone(hurt), cwd=ROOT, stderr=subprocess.PIPE, text=True) as run,
    ):
        while lines(tmp_path / "hurt") < 5:
            assert run.poll() is None
            time.sleep(0.01)
        worker = loader_worker(run.pid)
        assert worker is not None
        (group / "cgroup.procs").write_text(str(worker))
        _, said = run.communicate(timeout=300)
    assert run.returncode == 0
    assert f"(process {worker}) died at position" in said and "SIGKILL" in said, said
    assert_equal(weights(tmp_path / "hurt"), undisturbed(shards, tmp_path), FEW_STEPS)
