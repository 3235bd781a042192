"""What a person sees while a run trains: a bar on a terminal, plain lines in a log file."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

# shown values, by the last part of their name: `loss/total` and `total` alike
FORMATS = {
    "total": "loss {:.3f}",
    "feature_rank": "rank {:.0f}",
    "prototypes_used": "{:.0f} prototypes",
    "lr": "lr {:.1e}",
    "images_per_s": "{:.0f} images/s",
    "data_wait_percent": "waits for data {:.0f} %",
}


class Progress:
    """Progress of one session of a run, as a context manager."""

    def __init__(self, total: int, steps_done: int, console: Console | None = None) -> None:
        """Nothing is shown before the context is entered.

        Args:
            total: optimizer steps of the whole run.
            steps_done: steps done before this session; the time left is judged by the steps of this session.
            console: where to write; default: standard output.
        """
        self.total, self.steps_done = total, steps_done
        self.console = console or Console()
        self._since = time.perf_counter()
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=steps_done)

    def __enter__(self) -> Self:
        """Start the clock, and the bar on a terminal."""
        self._since = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that `step` optimizer steps are done, with the values among `FORMATS`."""
        text = "  ".join([*_formatted(values), f"eta {self._time_left(step)}"])
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.say(f"step {step}/{self.total}  {text}")

    def say(self, text: str) -> None:
        """Print a line as it is: above the bar on a terminal, never wrapped or coloured."""
        self.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        done = step - self.steps_done
        if done <= 0:
            return "?"
        seconds = (time.perf_counter() - self._since) / done * (self.total - step)
        return clock(seconds)


def clock(seconds: float) -> str:
    """A duration as `0:42`, `1:02:03` or `2d 01:02:03`, rounded to whole seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _formatted(values: Mapping[str, float]) -> list[str]:
    by_name = {name.rpartition("/")[2]: value for name, value in values.items()}
    return [text.format(by_name[name]) for name, text in FORMATS.items() if name in by_name]
