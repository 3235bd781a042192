"""How the ranks learn that one of them has failed, whatever they are doing just then.

A rank that fails leaves a note in the store that all ranks are connected to, and ends. The others look for
one every second in a thread: a rank that waits for the failed one in a collective cannot be woken on every
device, so a process that has not ended by itself some seconds later is ended here, with the same exit status.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import NoReturn

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from pretrain import records
from pretrain.command_line import TRAINING_ERROR, status_of
from pretrain.errors import InputError, TrainingError
from pretrain.redaction import without_secrets

NOTE = "fault"  # its key in the store
LEFT = "left"  # number of ranks, other than the store's, that need it no more
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0  # for a rank to end by itself once another one has failed
LOST_POLLS = 3  # in a row without an answer, after which the process with the store is taken for dead


class PeerError(RuntimeError):
    """Another rank has failed, and the ranks have agreed to end; `session` finds out why."""


@dataclass(frozen=True)
class Fault:
    """Why a run on many ranks ends."""

    rank: int  # that failed first
    status: int  # exit status of every rank
    line: str  # for people


def fault_of(error: BaseException, rank: int) -> Fault:
    """What an error of this rank means for all."""
    line, status = without_secrets(" ".join(str(error).split())), status_of(error)
    match error:
        case InputError() | OSError() | TrainingError():
            return Fault(rank, status, line)
        case KeyboardInterrupt():
            return Fault(rank, status, "interrupted")
        case SystemExit():
            return Fault(rank, status, f"ended with exit status {status}")
        case _:
            return Fault(
                rank, status, f"{type(error).__name__}: {line}; the traceback stands in its own output"
            )


class FaultLine:
    """The connection of one rank to the note; opened once a process."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Start to look for notes.

        Args:
            store: that all ranks are connected to.
            rank: of this process.
            world_size: number of ranks.
        """
        self.rank, self.world_size, self._store = rank, world_size, store
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(_own_connection(store),), daemon=True)
        self._thread.start()

    def publish(self, fault: Fault) -> Fault:
        """Leave a note, unless another rank was first; the note that counts."""
        try:
            return _read(self._store.compare_set(NOTE, "", json.dumps(asdict(fault)))) or fault
        except DistError:  # the store's process has ended, so all the others know
            return fault

    def wait(self, seconds: float) -> Fault | None:
        """The note, or None when there is none after so long."""
        with suppress(DistError):
            _until(lambda: self._store.check([NOTE]), seconds)
            return _read(self._store.get(NOTE)) if self._store.check([NOTE]) else None
        return None

    def tell(self, fault: Fault) -> None:
        """Say why the run ends, where a person may look for it: on rank 0 and on the rank that failed."""
        if self.rank in (0, fault.rank):
            name = f"rank {fault.rank}: " if fault.rank else ""
            print(f"pretrain: {name}{fault.line}", file=sys.stderr, flush=True)

    def end(self, fault: Fault) -> NoReturn:
        """End this process at once, with the fault's exit status: nothing else can."""
        self.tell(fault)
        records.end(fault.status, fault.line, is_cause=fault.rank == self.rank)
        sys.stdout.flush()
        os._exit(fault.status)

    def leave(self) -> None:
        """Stop looking: the process is about to end. The one that holds the store waits for the others."""
        self._leaving.set()
        self._thread.join()
        with suppress(DistError):
            if self.rank:
                self._store.add(LEFT, 1)
            else:
                seconds = GRACE_SECONDS + 2 * POLL_SECONDS
                _until(lambda: self._store.add(LEFT, 0) >= self.world_size - 1, seconds)

    def _listen(self, store: Store) -> None:
        lost = 0
        while not self._leaving.wait(POLL_SECONDS):
            fault = None
            try:
                fault = _read(store.get(NOTE)) if store.check([NOTE]) else None
                lost = 0
            except DistError as error:
                lost += 1
                if lost == LOST_POLLS:
                    fault = Fault(0, TRAINING_ERROR, f"has ended without a word ({error})")
            if fault and not self._leaving.wait(GRACE_SECONDS):
                self.end(fault)


def _own_connection(store: Store) -> Store:
    """To the same store: a connection serves one call at a time, and calls may wait."""
    mine: Store = store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
    return mine


def _until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


def _read(note: bytes) -> Fault | None:
    return Fault(**json.loads(note)) if note else None
