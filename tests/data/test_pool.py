"""Workers that die, hang or fail; the processes are real ones."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config.schema import Config
from pretrain.data.fork_server import JOB_SIGNALS
from pretrain.data.group import GroupMaker, GroupReport
from pretrain.data.loader import TrainLoader
from pretrain.data.pool import WorkerPool, _Worker
from pretrain.data.slots import GroupArrays, SharedSlots, SlotLayout
from pretrain.data.workers import Done, Task
from pretrain.errors import InputError, TrainingError
from pretrain.processes import children, started
from tests.data.conftest import GLOBAL_BATCH, GROUP

MakeConfig = Callable[..., Config]
PLENTY = 2**34


class Trapped(GroupMaker):
    """Makes groups, and does something else first at position 8 as long as a file is there (or always)."""

    def __init__(self, cfg: Config, trap: str, file: Path | None = None) -> None:
        super().__init__(cfg)
        self.trap, self.file = trap, file

    def make(self, first: int, out: GroupArrays) -> GroupReport:
        if first == 8 and (self.file is None or self.file.exists()):
            if self.file is not None:
                self.file.unlink()
            spring(self.trap)
        return super().make(first, out)


def spring(trap: str) -> None:
    match trap:
        case "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "vanish":
            os._exit(7)
        case "hang":
            time.sleep(1000)
        case "bug":
            raise ZeroDivisionError("a bug\nin two lines")
        case "input":
            raise InputError("one line")


@contextmanager
def pool_of(
    maker: GroupMaker, workers: int = 2, timeout: float = 60.0
) -> Iterator[tuple[WorkerPool, SharedSlots]]:
    slots = SharedSlots(SlotLayout(maker.cfg, GLOBAL_BATCH), 1, PLENTY)
    pool = WorkerPool(maker, slots, workers, timeout)
    try:
        yield pool, slots
    finally:
        pool.close()


def make_all(pool: WorkerPool) -> dict[Task, Done]:
    """The four groups of a batch."""
    tasks = [Task(0, group, group * GROUP) for group in range(GLOBAL_BATCH // GROUP)]
    for task in tasks:
        pool.submit(task)
    done: dict[Task, Done] = {}
    while len(done) < len(tasks):
        for item in pool.wait():
            assert item.task not in done
            done[item.task] = item
    return done


@pytest.fixture
def expected(make_config: MakeConfig) -> np.ndarray:
    loader = TrainLoader(make_config(), torch.device("cpu"), GLOBAL_BATCH)
    ((_, (batch,)),) = [(step, batches) for step, batches in loader.steps(0, 1)]
    return batch.global_crops.numpy().copy()


@pytest.mark.parametrize(
    ("trap", "end"), [("die", "SIGSEGV"), ("vanish", "exit status 7"), ("bug", "exit status 1")]
)
def test_a_worker_that_dies_is_replaced_at_its_position(
    make_config: MakeConfig,
    expected: np.ndarray,
    tmp_path: Path,
    trap: str,
    end: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "trap").touch()
    with pool_of(Trapped(make_config(), trap, tmp_path / "trap")) as (pool, slots):
        assert len(make_all(pool)) == 4
        np.testing.assert_array_equal(slots.arrays(0).global_crops.reshape(expected.shape), expected)
    error = capfd.readouterr().err
    assert "loader worker" in error and f"died at position 8 ({end})" in error
    if trap == "bug":
        assert "ZeroDivisionError" in error and "in spring" in error
    if trap == "die":
        assert "Segmentation fault" in error and "in spring" in error


@pytest.mark.dist  # alone on the machine: a worker that starts is silent for seconds
def test_a_stuck_worker_is_replaced(
    make_config: MakeConfig, expected: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trap").touch()
    with pool_of(Trapped(make_config(), "hang", tmp_path / "trap"), timeout=8.0) as (pool, slots):
        make_all(pool)
        np.testing.assert_array_equal(slots.arrays(0).global_crops.reshape(expected.shape), expected)
    error = capfd.readouterr().err
    assert "was stuck for 8 s (data.worker_timeout) at position 8 (SIGABRT)" in error
    assert "in spring" in error  # where it stood


def test_the_third_loss_at_a_position_ends_the_run(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        pool_of(Trapped(make_config(), "bug")) as (pool, _),
        pytest.raises(TrainingError, match=r"died 3 times at position 8 \(exit status 1\): in two lines; "),
    ):
        make_all(pool)
    assert capfd.readouterr().err.count("ZeroDivisionError: a bug") == 3


def test_an_error_for_a_person_is_handed_over(make_config: MakeConfig) -> None:
    with pool_of(Trapped(make_config(), "input"), workers=1) as (pool, _):
        errors = [done.error for done in make_all(pool).values()]
    assert [str(error) for error in errors if error is not None] == ["one line"]


def test_a_killed_worker_does_not_stop_the_loader(make_config: MakeConfig) -> None:
    cfg = make_config(workers=2)
    plain = TrainLoader(make_config(), torch.device("cpu"), GLOBAL_BATCH)
    reference = [batch.global_crops.clone() for _, (batch,) in plain.steps(0, 6)]
    loader = TrainLoader(cfg, torch.device("cpu"), GLOBAL_BATCH)
    for step, (batch,) in loader.steps(0, 6):
        assert torch.equal(batch.global_crops, reference[step])
        if step == 1:
            kill_a_child()


def test_a_jobs_signals_do_not_end_the_fork_server(make_config: MakeConfig) -> None:
    """Neither while it loads nor later: the next worker could not be started."""
    with pool_of(Trapped(make_config(), "none"), workers=1) as (pool, _):
        servers = [pid for pid in children(os.getpid()) if is_fork_server(pid)]
        blocked = {number for pid in servers for number in blocked_signals(pid)}
        assert len(servers) == 1 and blocked >= JOB_SIGNALS
        for number in JOB_SIGNALS:
            os.kill(servers[0], number)
        make_all(pool)
        assert started(servers[0])


def is_fork_server(pid: int) -> bool:
    return b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()


def blocked_signals(pid: int) -> set[int]:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def kill_a_child() -> None:
    """The loader worker with the smallest process number, a child of the fork server."""
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            is_worker = b"forkserver" in (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if (
            is_worker
            and parent != os.getpid()
            and b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes()
        ):
            os.kill(int(folder.name), signal.SIGKILL)
            return
    raise AssertionError("no worker")


def test_memory_that_is_not_there_is_one_line(make_config: MakeConfig) -> None:
    layout = SlotLayout(make_config(), GLOBAL_BATCH)
    with pytest.raises(
        InputError, match=r"^data.workers: 5 slots of \d+ MiB .* 0 MiB .*; lower data.workers"
    ):
        SharedSlots(layout, 5, 1000)


def test_slots_do_not_overlap(make_config: MakeConfig) -> None:
    cfg = make_config(augment_on="device")
    cfg = replace(cfg, model=replace(cfg.model, drop_path_rate=0.3))
    slots = SharedSlots(SlotLayout(cfg, GLOBAL_BATCH), 3, PLENTY)
    arrays: list[Any] = [
        array for slot in range(3) for group in range(4) for array in slots.arrays(slot).group(group)
    ]
    for number, array in enumerate(arrays):
        assert array is not None and array.flags.writeable
        array[...] = number % 2 if array.dtype == bool else number
    for number, array in enumerate(arrays):
        assert (array == (number % 2 if array.dtype == bool else number)).all()


def test_the_memory_is_nameless(make_config: MakeConfig) -> None:
    before = set(Path("/dev/shm").iterdir())
    slots = SharedSlots(SlotLayout(make_config(), GLOBAL_BATCH), 2, PLENTY)
    assert set(Path("/dev/shm").iterdir()) == before
    assert slots.arrays(1).global_crops.shape == (2, GLOBAL_BATCH, 3, 32, 32)


class Unreadable(GroupMaker):
    """Ends the process that is to work with it before that has asked for a task."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        os._exit(7)


class Late(deque[Task]):
    """Tasks that are given to a process when it has ended."""

    def __init__(self, tasks: list[Task], worker: _Worker) -> None:
        super().__init__(tasks)
        self.worker = worker

    def __iter__(self) -> Iterator[Task]:
        self.worker.process.join()
        return super().__iter__()


def test_a_process_that_ends_before_it_gets_its_tasks_is_lost_like_any_other(make_config: MakeConfig) -> None:
    maker = Unreadable(make_config())
    worker = _Worker.__new__(_Worker)  # not started yet
    worker.number, worker.tasks = 0, Late([Task(0, 0, 0)], worker)
    worker._maker, worker._slots = maker, SharedSlots(SlotLayout(maker.cfg, GLOBAL_BATCH), 1, PLENTY)
    worker.start()
    assert worker.process.exitcode == 7
    worker.end()
