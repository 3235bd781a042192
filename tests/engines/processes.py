"""Runs a function on several real gloo ranks and returns what each of them returned."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

LIMIT_SECONDS = 240


def on_ranks(world_size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each rank, of a module that can be imported; results by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (world_size, free_port(), folder, function, arguments)
    context = start_processes(_run, arguments, world_size, join=False, start_method="spawn")
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{world_size} ranks did not end in {LIMIT_SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(world_size)]


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _run(rank: int, world_size: int, port: int, folder: Path, function: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        torch.save(function(*arguments), folder / f"rank_{rank}.pt")
    finally:
        dist.destroy_process_group()
