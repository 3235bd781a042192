"""What the process table tells, from /proc (elsewhere less is known), and how threads wait. No torch."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

STATE, PARENT, START = 0, 1, 19  # fields of /proc/PID/stat, counted behind the name
ENDED = ("Z", "X")  # states of a process that has ended and was not waited for


def started(pid: object) -> str:
    """When a process of this machine started, in ticks since boot; "" if it runs no more.

    A reused process number has another time. Without /proc every running process answers "running".
    """
    try:
        if not Path("/proc/self/stat").exists():
            os.kill(int(str(pid)), 0)
            return "running"
        fields = _stat(pid)
        return "" if fields[STATE] in ENDED else fields[START]
    except (OSError, ValueError, IndexError):
        return ""


def let_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait; before torch is loaded, which reads this.

    On shared cores, threads that spin while one is descheduled slowed a CPU run down five to ten times;
    threads that sleep cost a few percent on an idle one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def kill_tree(pid: int) -> None:
    """Kill a child process and what it started; the child itself is left for its parent to reap.

    Without /proc only the child is killed: what it started then ends at its next write to a closed pipe.
    """
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # a stopped process starts no further ones
        for child in children(pid):
            kill_tree(child)
        os.kill(pid, signal.SIGKILL)  # SIGTERM is blocked in what a loader worker starts


def children(pid: int) -> list[int]:
    """The processes that a process started and that run, or wait to be reaped; none without /proc."""
    return list(_children(pid))


def _children(pid: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if int(_stat(folder.name)[PARENT]) == pid:
                yield int(folder.name)


def _stat(pid: object) -> list[str]:
    """The fields behind the name, which may hold blanks and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
