"""The processes that make groups: who makes what, and what happens when one dies or hangs.

A group is a pure function of its position, so the work of a lost process is simply given to its successor.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from typing import Protocol

from pretrain.data.fork_server import start_fork_server
from pretrain.data.group import GroupMaker
from pretrain.data.slots import LocalSlots, SharedSlots, nameless_file
from pretrain.data.workers import Done, Task, make, work
from pretrain.errors import TrainingError

PRELOADED = ["pretrain.data.workers"]  # imported once by the fork server, not by each worker
RESTARTS = 2  # of the process that makes a certain group
MAX_TRACE = 100_000  # bytes of a traceback that are shown
END_SECONDS = 5.0  # that a process has to end in before it is killed


class Pool(Protocol):
    """Makes groups in the order given, and tells which are done in any order."""

    def submit(self, task: Task) -> None:
        """Have a group made."""

    def wait(self, seconds: float | None = None) -> list[Done]:
        """What was finished since the last call; waits for at least one group, or so many seconds."""

    def close(self) -> None:
        """End all work."""


class InlinePool:
    """Makes each group when it is waited for, in this process."""

    def __init__(self, maker: GroupMaker, slots: LocalSlots) -> None:
        self.maker, self.slots = maker, slots
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """Have a group made."""
        self._tasks.append(task)

    def wait(self, seconds: float | None = None) -> list[Done]:
        """The next group; none when it must not take time."""
        return [] if seconds == 0 else [make(self.maker, self.slots, self._tasks.popleft(), 0.0)]

    def close(self) -> None:
        """Close the files."""
        self.maker.reader.close()


class _Worker:
    """One process and the tasks that it was given."""

    def __init__(self, number: int, maker: GroupMaker, slots: SharedSlots) -> None:
        self.number = number
        self.tasks: deque[Task] = deque()
        self._maker, self._slots = maker, slots
        self.start()

    def start(self) -> None:
        """Start the process, and give it what the one before it left."""
        self.trace = nameless_file()
        context = multiprocessing.get_context("forkserver")  # a fork would copy locks and CUDA state
        context.set_forkserver_preload(PRELOADED)
        start_fork_server()
        self.connection, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(
            target=work,
            args=(self._maker, self._slots, theirs, self.trace),
            name=f"loader worker {self.number}",
            daemon=True,
        )
        self.process.start()
        theirs.close()
        self.since = time.monotonic()  # it was last heard of
        for task in self.tasks:
            self._send(task)

    def submit(self, task: Task) -> None:
        self.tasks.append(task)
        self._send(task)

    def _send(self, task: Task) -> None:
        with suppress(OSError):  # it has died: `wait` sees it too, and starts another one with all its tasks
            self.connection.send(task)

    def receive(self) -> Done:
        done: Done = self.connection.recv()
        self.since = time.monotonic()
        self.tasks.remove(done.task)
        return done

    def end(self, number: int = signal.SIGTERM) -> str:
        """End the process and return what it wrote about its end."""
        self.connection.close()
        _kill(self.process, number)
        return os.pread(self.trace.descriptor, MAX_TRACE, 0).decode(errors="replace")


class WorkerPool:
    """Processes of their own, which write to shared slots."""

    def __init__(self, maker: GroupMaker, slots: SharedSlots, workers: int, timeout: float) -> None:
        """Start the processes.

        Args:
            maker: of the run.
            slots: where groups go.
            workers: processes.
            timeout: seconds without a word from a process that has work before it counts as stuck.
        """
        self.timeout = timeout
        self._losses: Counter[Task] = Counter()
        self._workers = [_Worker(number, maker, slots) for number in range(workers)]

    def submit(self, task: Task) -> None:
        """Have a group made by the process with the least to do."""
        worker = min(self._workers, key=lambda worker: len(worker.tasks))
        if not worker.tasks:
            worker.since = time.monotonic()
        worker.submit(task)

    def wait(self, seconds: float | None = None) -> list[Done]:
        """What was finished since the last call; waits for at least one group, or so many seconds.

        Raises:
            TrainingError: a process died or hung three times at the same group.
        """
        end = None if seconds is None else time.monotonic() + seconds
        done: list[Done] = []
        while not done:
            left = (
                self._patience() if end is None else max(0.0, min(end - time.monotonic(), self._patience()))
            )
            ready = wait(
                [w.connection for w in self._workers] + [w.process.sentinel for w in self._workers], left
            )
            for worker in self._workers:
                if worker.connection in ready or worker.process.sentinel in ready:
                    done += self._receive(worker)
            self._restart_stuck()
            if end is not None and time.monotonic() >= end:
                break
        return done

    def _receive(self, worker: _Worker) -> list[Done]:
        """All that a process has sent; one that has died is replaced."""
        done = []
        try:
            while worker.connection.poll():
                done.append(worker.receive())
        except (EOFError, OSError):
            self._replace(worker, 0, "died")
            return done
        if not worker.process.is_alive():
            self._replace(worker, 0, "died")
        return done

    def _patience(self) -> float:
        """Seconds until the first process counts as stuck."""
        waiting = [worker.since for worker in self._workers if worker.tasks]
        return max(0.0, min(waiting, default=time.monotonic()) + self.timeout - time.monotonic())

    def _restart_stuck(self) -> None:
        for worker in self._workers:
            if worker.tasks and time.monotonic() - worker.since > self.timeout:
                reason = f"was stuck for {self.timeout:g} s (data.worker_timeout)"
                self._replace(worker, signal.SIGABRT, reason)  # which makes it write where it stands

    def _replace(self, worker: _Worker, number: int, reason: str) -> None:
        pid, trace = worker.process.pid, worker.end(number)
        if worker.process.exitcode is None:
            raise TrainingError(f"loader worker {worker.number} (process {pid}) does not end: storage hangs?")
        status = _status(worker.process.exitcode)
        place = f"at position {worker.tasks[0].first}" if worker.tasks else "without work"
        print(f"loader worker {worker.number} (process {pid}) {reason} {place}{status}", file=sys.stderr)
        print(trace, end="", file=sys.stderr, flush=True)
        for task in list(worker.tasks)[:1]:
            self._losses[task] += 1
            if self._losses[task] > RESTARTS:
                last = trace.strip().splitlines()[-1:] or ["no traceback"]
                raise TrainingError(
                    f"loader worker {worker.number} {reason} {RESTARTS + 1} times {place}{status}: "
                    f"{last[0]}; the traceback stands above"
                )
        worker.start()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.end()


def _kill(process: ForkServerProcess, number: int) -> None:
    """End a process by a signal (0: it ends by itself), and by SIGKILL where that does not help."""
    if process.is_alive() and process.pid is not None:
        with suppress(ProcessLookupError):  # the fork server may have seen its end before this process does
            os.kill(process.pid, number)
    process.join(END_SECONDS)
    if process.is_alive():
        process.kill()
        process.join(END_SECONDS)


def _status(code: int) -> str:
    """How a process ended, in brackets."""
    if code == -signal.SIGKILL:
        return " (SIGKILL: for want of memory?)"  # with which the kernel ends what goes beyond a limit
    return f" ({signal.Signals(-code).name})" if code < 0 else f" (exit status {code})"
