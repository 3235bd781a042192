"""Real processes that find one another as ranks do, for tests: one start serves several checks."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 120.0  # seconds, after which a test has failed


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
    mine = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **here, **mine}


def start_ranks(command: list[str], world_size: int, **output: object) -> list[subprocess.Popen]:
    """Start `python COMMAND` once a rank."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=rank_environment(rank, world_size, port),
            cwd=ROOT,
            text=True,
            stdout=tempfile.TemporaryFile("w+"),
            stderr=tempfile.TemporaryFile("w+"),
        )
        for rank in range(world_size)
    ]
