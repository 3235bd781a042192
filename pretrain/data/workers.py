"""What happens inside a loader process, and how it lives and dies.

A signal sent to the whole job (Ctrl-C, a batch system's warning) is for the training process, which then
saves a checkpoint and needs its workers meanwhile; so workers ignore signals. They end when the training
process tells them to, and within seconds of its death, even by kill -9. A fork server does not do that by
itself: it waits for its children, and they for it.
"""

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

import cv2
import torch

from pretrain.data.fork_server import JOB_SIGNALS
from pretrain.data.group import GroupMaker, GroupReport
from pretrain.data.slots import LocalSlots, SharedFile, SharedSlots
from pretrain.errors import InputError, TrainingError
from pretrain.redaction import without_secrets

IGNORED = JOB_SIGNALS - {signal.SIGTERM}
POLL_SECONDS = 1.0


class Task(NamedTuple):
    """A group to be made."""

    slot: int
    group: int  # its place in the slot
    first: int  # position of its first image


class Done(NamedTuple):
    """A group that was made, or why it cannot be."""

    task: Task
    report: GroupReport
    idle_seconds: float  # that the worker waited for the task
    error: InputError | TrainingError | None = None


def work(maker: GroupMaker, slots: SharedSlots, tasks: Connection, trace: SharedFile) -> None:
    """Make groups until the connection ends. An unforeseen error is written to `trace` and ends the process.

    Args:
        maker: of the run.
        slots: memory to write to.
        tasks: brings a `Task`, takes a `Done`.
        trace: takes the traceback, also that of a crash in native code.
    """
    faulthandler.enable(trace.descriptor)
    _start_worker()
    try:
        while True:
            since = time.perf_counter()
            task = tasks.recv()
            tasks.send(make(maker, slots, task, time.perf_counter() - since))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the training process has ended, or wants no more
    except BaseException:
        os.write(trace.descriptor, without_secrets(traceback.format_exc()).encode())
        os._exit(1)


def make(maker: GroupMaker, slots: SharedSlots | LocalSlots, task: Task, idle_seconds: float) -> Done:
    """Make one group; an error that a person is meant to read is handed over."""
    try:
        report = maker.make(task.first, slots.arrays(task.slot).group(task.group))
    except (InputError, TrainingError) as error:
        return Done(task, GroupReport(), idle_seconds, error)
    return Done(task, report, idle_seconds)


def _start_worker() -> None:
    """Set up the calling process as a loader worker: signals, life line, one thread."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its traceback is kept; its memory would fill the disk
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # blocked, as the fork server has it: the thread below waits for it instead
    how = signal.SIG_UNBLOCK if sys.platform == "darwin" else signal.SIG_BLOCK
    signal.pthread_sigmask(how, {signal.SIGTERM})
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    """End the process when its parent has ended, or asks for it by SIGTERM."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"
    while parent.is_alive():
        if _terminated_by(parent.pid):
            break
    os._exit(1)


def _terminated_by(pid: int | None) -> bool:
    """Wait a moment for SIGTERM; whether it came, and from that process."""
    if sys.platform == "darwin":  # cannot wait for a signal; there SIGTERM ends a worker whoever sends it
        time.sleep(POLL_SECONDS)
        return False
    received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
    return received is not None and received.si_pid == pid
