"""A run that hangs says where: the stacks of every rank, written while the rank still stands there.

`faulthandler` writes them from a thread of its own that needs no interpreter lock, so a main thread stuck in
native code is shown too. Ranks wait for one another within a step, so when one hangs, all of them write.
"""

import faulthandler
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pretrain.config.schema import EngineConfig
from pretrain.distributed import rank
from pretrain.errors import InputError
from pretrain.session import give_up

POLL_SECONDS = 0.5
SLACK = 0.05  # of a time limit: setting the timer anew costs a thread, 0.1 to 0.3 ms, so not at every step
MARGIN_SECONDS = 15.0  # after engine.timeout, in which a process group that can end the run itself does so


class Watchdog:
    """Entered around the training loop, which calls `step` at the end of every step."""

    def __init__(self, folder: Path, cfg: EngineConfig) -> None:
        """Nothing is watched before the context is entered, and nothing at all with `hang_timeout` 0.

        Args:
            folder: for the stacks, `rank_00000.txt` and so on; removed again when none were written.
            cfg: its two time-outs.
        """
        self.path = folder / f"rank_{rank():05}.txt"
        self.hang_timeout, self.timeout = cfg.hang_timeout, cfg.timeout
        # the first step compiles, and its ranks need not do so equally fast
        self._limit = (cfg.hang_timeout + cfg.timeout) / 2
        self._since, self._watching, self._said = time.monotonic(), False, False
        self._timer_since = -math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        """Watch from now on, with more time for the first step.

        Raises:
            InputError: the folder cannot be written.
        """
        if not self.hang_timeout:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error}); set run.dir") from error
        self._arm()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        if not self.hang_timeout:
            return
        self._disarm()
        self._stop.set()
        self._thread.join()
        self._file.close()
        with suppress(OSError):
            if not self.path.stat().st_size:
                self.path.unlink()
            self.path.parent.rmdir()  # unless stacks are in it

    def step(self) -> None:
        """A step is done: the next one has `hang_timeout` seconds, and up to a twentieth more."""
        if self._limit != self.hang_timeout:
            self._limit, self._timer_since = self.hang_timeout, -math.inf
        self._arm()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For work between steps whose length nobody knows, such as k-NN on a large set."""
        self._disarm()
        yield
        self._arm()

    def _arm(self) -> None:
        if self.hang_timeout:
            self._since, self._said, self._watching = time.monotonic(), False, True
            if self._since - self._timer_since > SLACK * self._limit:
                self._timer_since = self._since
                faulthandler.dump_traceback_later((1 + SLACK) * self._limit, file=self._file)

    def _disarm(self) -> None:
        self._watching, self._timer_since = False, -math.inf
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            quiet = time.monotonic() - self._since
            if self._watching and not self._said and quiet > (1 + SLACK) * self._limit + POLL_SECONDS:
                self._said = True
                self._tell(quiet)
            if self._watching and quiet > max(self.timeout, self._limit) + MARGIN_SECONDS:
                give_up(
                    f"no step finished for {quiet:.0f} s (engine.timeout={self.timeout:g}); what each rank "
                    f"was doing stands in {self.path.parent}"
                )

    def _tell(self, quiet: float) -> None:
        place = f"process {os.getpid()} on {socket.gethostname()}"
        with suppress(OSError):
            self._file.write(f"rank {rank()}, {place}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n\n")
            self._file.flush()
        name = f"pretrain: rank {rank()}" if rank() else "pretrain"
        text = f"no step finished for {quiet:.0f} s (engine.hang_timeout); stacks of all threads: {self.path}"
        print(f"{name}: {text}", file=sys.stderr, flush=True)
