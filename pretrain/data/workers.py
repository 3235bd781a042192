"""How a loader process lives and dies.

A signal sent to the whole job (Ctrl-C, a batch system's warning) is for the training process, which then
saves a checkpoint and needs its workers meanwhile; so workers ignore signals. They end when the training
process tells them to, and within seconds of its death, even by kill -9. A fork server does not do that by
itself: it waits for its children, and they for it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time

import cv2

IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
POLL_SECONDS = 1.0


def start_worker(_: int) -> None:
    """Set up the calling process as a loader worker: signals, life line, one thread."""
    cv2.setNumThreads(0)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "darwin":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the thread below waits for it instead
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
