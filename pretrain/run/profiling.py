"""Where the time of a step goes: phases timed without waiting for the device, and traces of chosen steps."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Item = TypeVar("Item")
Interval = tuple[torch.cuda.Event, torch.cuda.Event]


class PhaseTimer:
    """Seconds per step of each phase of the loop; a phase also names its part of a trace.

    On a GPU the clock is the device's own, read when the means are taken: a phase that only queues work takes
    as long as that work, and the wait for data is the time for which the device had nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing timed yet.

        Args:
            device: that computes.
        """
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._intervals: dict[str, list[Interval]] = defaultdict(list)
        self._steps = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase; blocks of one name add up, and must not hold one another."""
        with record_function(name):
            if self._on_gpu:
                start = _now_on_device()
                yield
                self._intervals[name].append((start, _now_on_device()))
            else:
                since = time.perf_counter()
                yield
                self._seconds[name] += time.perf_counter() - since

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items, one a step; the time until each is there belongs to the phase."""
        iterator = iter(items)
        try:
            while True:
                with self.phase(name):
                    item = next(iterator, _END)
                if isinstance(item, _End):
                    return
                self._steps += 1
                yield item
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    def means(self) -> dict[str, float]:
        """Seconds per step of each phase since the last call, which are then forgotten.

        Call it where the loop waits for the device anyway, that is, after `Averages.means`.
        """
        seconds, steps = dict(self._seconds), max(self._steps, 1)
        for name, intervals in self._intervals.items():
            intervals[-1][1].synchronize()
            seconds[name] = sum(start.elapsed_time(end) for start, end in intervals) / 1000  # from ms
        self._seconds.clear()
        self._intervals.clear()
        self._steps = 0
        return {name: value / steps for name, value in seconds.items()}


class _End:
    """What `next` gives at the end of any items."""


_END = _End()


def _now_on_device() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class StepProfiler:
    """A trace of the steps `log.profile_steps`, as a context manager around the loop.

    The file, `step_00000010.pt.trace.json.gz` after its first step, opens in ui.perfetto.dev, in
    chrome://tracing and in TensorBoard's profile plug-in.
    """

    def __init__(self, folder: Path, steps: Sequence[int], next_step: int = 0) -> None:
        """Nothing happens before the context is entered, and nothing at all without steps.

        Args:
            folder: for the trace; made when it is written.
            steps: empty, or [first, last]: steps first to last - 1 are traced.
            next_step: the step that the loop will run first.
        """
        self.folder = folder
        self.first, self.last = steps if steps else (0, 0)
        self.next_step = next_step
        self._profile: profile | None = None
        self._since = 0

    def __enter__(self) -> Self:
        """Start at once where the first step belongs to the trace."""
        self._start_or_stop()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what was traced when the loop ends early."""
        self._write()

    def step(self, step: int) -> None:
        """End of a turn of the loop: step number `step` is done."""
        self.next_step = step + 1
        self._start_or_stop()

    def _start_or_stop(self) -> None:
        traced = self.first <= self.next_step < self.last
        if traced and self._profile is None:
            self._start()
        if not traced and self._profile is not None:
            self._write()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._since = self.next_step
        self._profile = profile(activities=activities)
        self._profile.start()

    def _write(self) -> None:
        if self._profile is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the kernels of the last steps are missing
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{self._since:08d}.pt.trace.json.gz"  # TensorBoard looks for such names
        self._profile.export_chrome_trace(str(self.folder / name))
        self._profile = None
