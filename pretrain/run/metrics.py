"""The numbers of a run: averaged on the device, then written to metrics.jsonl and to TensorBoard."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pretrain.distributed import all_sum
from pretrain.errors import InputError
from pretrain.run.durable import write_text


class Averages:
    """Means of device scalars since the last call of `means`; adding to them never waits for the device."""

    def __init__(self) -> None:
        """No values yet."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], good: Tensor | bool = True) -> None:
        """Add one value per name: tensors with one element, all on one device; summed in fp32.

        Args:
            values: by name.
            good: a bool, or a bool scalar on the device; values of a step that was skipped do not count.
        """
        for name, value in values.items():
            value = value.detach().float().reshape(())
            counts = torch.ones_like(value) * good
            value = torch.where(counts > 0, value, 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def means(self) -> dict[str, float]:
        """The mean of each name over the times it was added on any rank, which are then forgotten.

        NaN where none counted. Collective: every rank must have added the same names, in the same order; one
        reduction for all of them. One copy from device to host: the only point of the training loop where
        the host waits for the device.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        columns = [torch.stack([values[name] for name in names]) for values in (self._sums, self._counts)]
        sums, counts = all_sum(torch.stack(columns))
        self._sums, self._counts = {}, {}
        return dict(zip(names, (sums / counts).tolist(), strict=True))


class Throughput:
    """Images per second since the last reading.

    Read it after `Averages.means`: the host runs ahead of a GPU, and only then are the counted steps done.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self._images, self._since = 0, time.perf_counter()

    def add(self, images: int) -> None:
        """Count images whose step was started."""
        self._images += images

    def rate(self) -> float:
        """Images per second of wall time since the last reading, or since the start; starts a new window."""
        now = time.perf_counter()
        rate = self._images / max(now - self._since, 1e-9)
        self._images, self._since = 0, now
        return rate


class MetricLog:
    """`metrics.jsonl`, one object per line, and the same scalars for TensorBoard in `tensorboard/`."""

    def __init__(self, folder: Path | None, tensorboard: bool, steps_done: int) -> None:
        """Open both for a session, dropping what a killed one wrote for the steps that are now run again.

        Args:
            folder: the run's folder; None = nothing is written: rank 0 alone writes.
            tensorboard: whether to write for TensorBoard as well.
            steps_done: optimizer steps of the checkpoint this session continues from; values of later steps
                are dropped. 0 = from the start, which drops everything.

        Raises:
            InputError: the folder cannot be written.
        """
        first = steps_done + 1 if steps_done else 0  # a new run may write at step 0, before it trains
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._folder = folder
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_lines(folder / "metrics.jsonl", first)
            self._file = (folder / "metrics.jsonl").open("a")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error}); set run.dir") from error
        # TensorBoard hides the points from `purge_step` on that an earlier session wrote
        board = folder / "tensorboard"
        self._board = SummaryWriter(str(board), purge_step=first) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step: a line `{"step": 10, "loss/total": 7.1}`, complete on return.

        JSON has no NaN and no infinity: such a value becomes null, its name an entry of the list "nonfinite".

        Raises:
            InputError: the disk is full or away.
        """
        lost = [name for name, value in values.items() if not math.isfinite(value)]
        line: dict[str, Any] = {"step": step, **values, **dict.fromkeys(lost)}
        if lost:
            line["nonfinite"] = lost
        with self._one_line_of_failure():
            if self._file is not None:
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
                self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Show a picture, (3, height, width) uint8, in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, pixels, step)

    def close(self) -> None:
        """Close both; TensorBoard's last points are on the disk after this. Quiet once writing failed."""
        with self._one_line_of_failure():
            if self._file is not None:
                self._file.close()
            if self._board is not None:
                self._board.close()

    @contextmanager
    def _one_line_of_failure(self) -> Iterator[None]:
        """Name the file, which the system's own words do not, and leave what a full disk did not take."""
        try:
            yield
        except OSError as error:
            file, self._file, self._board = self._file, None, None
            with suppress(OSError):
                if file is not None:
                    file.close()  # tries to write the rest once more
            raise InputError(
                f"{self._folder}: metrics cannot be written ({error.strerror or error}); make room, then "
                "start again"
            ) from error


def _drop_lines(path: Path, first: int) -> None:
    """Rewrite the file without lines of step `first` and later, or cut off by a kill."""
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and 0 <= _step(line) < first]
    if kept != lines:
        write_text(path, "".join(kept))


def _step(line: str) -> int:
    """The step of one line; -1 for a line that a crash left unreadable."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1
