"""Ranks as forks of a process that has imported torch: they start in tenths of a second instead of seconds.

For scripts that start no thread of their own before they fork; a test runs such a script with `run_script`.
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def run_script(module: str, *arguments: object, timeout: float = 120) -> list[str]:
    """Lines that a script of these tests prints; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def start_ranks(world_size: int, work: Callable[[], None], store: Path) -> list[int]:
    """Fork ranks that do `work` in a gloo group (none for a world size of 0); their process numbers."""
    sys.stdout.flush()
    return [_start(rank, world_size, work, store) for rank in range(max(world_size, 1))]


def run_ranks(world_size: int, work: Callable[[], None], store: Path, timeout: float = 60) -> None:
    """The same, until all have ended well; in time, or they are killed."""
    ends = wait_for(start_ranks(world_size, work, store), timeout)
    assert set(ends.values()) == {0}, f"ranks ended with {ends}"


def wait_for(pids: list[int], timeout: float) -> dict[int, int]:
    """Exit status of each process; those that do not end in time are killed, which shows as -9."""
    ends: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(ends) < len(pids):
        if time.monotonic() > deadline:
            for pid in set(pids) - set(ends):
                os.kill(pid, 9)
        for pid in set(pids) - set(ends):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                ends[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return ends


def _start(rank: int, world_size: int, work: Callable[[], None], store: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        if world_size:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        work()
        if world_size:
            dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
