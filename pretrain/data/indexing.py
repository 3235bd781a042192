"""Indexes of many shards, built by several processes: each reads and checks whole shards."""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from pretrain.data.index import build_index

MAX_PROCESSES = 16  # more would only wait for the disk


def build_indexes(shards: Sequence[Path]) -> Iterator[int]:
    """Build the index of each shard anew; the number of its samples, in the order of the shards.

    Raises:
        InputError: a shard is damaged, or its folder is not writable.
    """
    processes = min(len(shards), available_cores(), MAX_PROCESSES)
    if processes < 2:
        yield from map(build_index, shards)
        return
    pool = ProcessPoolExecutor(processes, get_context("forkserver"), _ignore_interrupts)
    try:
        yield from pool.map(build_index, shards)
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use; batch systems and containers give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ignore_interrupts() -> None:
    """Ctrl-C is for the process that waits for the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
