"""Corrupt samples: each is named once, all are counted, and too many end the run."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.data.reader import CorruptSample
from pretrain.errors import InputError, printable

SHOWN = 10  # that are also printed
FEWEST_READ = 1_000  # samples; before so many were read, their share says nothing


class CorruptLog:
    """The corrupt samples that one rank met: a line each in a file, shard, key and reason between tabs."""

    def __init__(self, path: Path | None, max_share: float) -> None:
        """Go on with the file of an earlier session.

        Args:
            path: of the file, made with the first line; None = none is written.
            max_share: of the samples read that may be corrupt.
        """
        self.path, self.max_share = path, max_share
        self.read, self.corrupt = 0, 0  # in this session
        written = path.read_text(errors="replace").splitlines() if path is not None and path.exists() else []
        self._known = {tuple(line.split("\t")[:2]) for line in written}

    def add(self, images: int, corrupt: Sequence[CorruptSample]) -> None:
        """Count images that were made and the corrupt samples met on the way.

        Raises:
            InputError: their share is too large.
        """
        self.read += images + len(corrupt)
        self.corrupt += len(corrupt)
        for sample in corrupt:
            place = printable(sample.shard), printable(sample.key)
            if place not in self._known:
                self._known.add(place)
                self._write(sample)
        if self.corrupt > self.max_share * max(self.read, FEWEST_READ):
            listed = f"; all are listed in {self.path}" if self.path is not None else ""
            raise InputError(
                f"data.max_corrupt={self.max_share:g}: {self.corrupt} of {self.read} samples are corrupt, "
                f"the last one {corrupt[-1]}{listed}"
            )

    def _write(self, sample: CorruptSample) -> None:
        if len(self._known) <= SHOWN:
            more = "; no more are shown" if len(self._known) == SHOWN else ""
            print(
                f"corrupt, replaced by the next one: {printable(str(sample))}{more}",
                file=sys.stderr,
                flush=True,
            )
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(
                    "\t".join(printable(text) for text in (sample.shard, sample.key, sample.reason)) + "\n"
                )
