"""Signals that end a run in good order: finish the step, save, exit with a status of its own.

A batch system may signal one process of a job, or all of them at different moments; the ranks agree at the
end of a step, so that all save the same one.
"""

import signal
from types import FrameType, TracebackType
from typing import Self

from pretrain.distributed import largest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Preemption:
    """The first signal sets a flag that the loop reads between steps; a second Ctrl-C interrupts at once."""

    def __init__(self, check_every: int = 1) -> None:
        """Nothing received yet.

        Args:
            check_every: steps between the ranks' agreements.
        """
        self.check_every = check_every
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Take over the signals of `SIGNALS`."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self, step: int) -> bool:
        """Whether the run should save and stop, because any rank has received a signal.

        Collective: the same answer on every rank. Always False at steps that are not looked at.

        Args:
            step: optimizer steps done.
        """
        if step % self.check_every:
            return False
        number = largest(self.received or 0)
        if number and self.received is None:  # another rank was told
            self.received = signal.Signals(number)
        return number > 0

    @property
    def reason(self) -> str:
        """What happened, for people."""
        return f"stopped by {self.received.name}" if self.received else "not stopped"

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
