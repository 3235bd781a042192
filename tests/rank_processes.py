"""Real processes that find one another as the ranks of a run do."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 150.0  # seconds, after which a test has failed


class Ended(NamedTuple):
    """How a rank ended."""

    status: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **here, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in names.items()}}


def start_ranks(command: list[str], folder: Path, world_size: int = 2) -> list[subprocess.Popen]:
    """Start `python COMMAND` once a rank; its outputs go to RANK.out and RANK.err in the folder."""
    port, processes = free_port(), []
    for rank in range(world_size):
        environment = rank_environment(rank, world_size, port)
        with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
            started = subprocess.Popen(
                [sys.executable, *command], env=environment, cwd=ROOT, stdout=out, stderr=err
            )
        processes.append(started)
    return processes


def ended(processes: list[subprocess.Popen], folder: Path) -> list[Ended]:
    """Wait for the end of all ranks; none is left behind."""
    deadline = time.monotonic() + LIMIT
    try:
        statuses = [process.wait(max(deadline - time.monotonic(), 0)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs = [
        [(folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(len(statuses))
    ]
    return [Ended(status, *output) for status, output in zip(statuses, outputs, strict=True)]


def run_ranks(command: list[str], folder: Path, world_size: int = 2) -> list[Ended]:
    """Run `python COMMAND` once a rank, to the end of all."""
    return ended(start_ranks(command, folder, world_size), folder)
