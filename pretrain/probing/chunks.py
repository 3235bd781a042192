"""The rows that probes are fitted on, in chunks over which the solver sums: from memory or from a file."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import InputError
from pretrain.probing.history import moved
from pretrain.probing.preprocessing import Features

CHUNK = 2**22  # numbers of one probe's chunk, rows and scores: 16 MiB in fp32


def chunk_rows(channels: int, classes: int) -> int:
    """Rows of a chunk where memory does not ask for fewer."""
    return max(1, CHUNK // (channels + classes))


class Resident:
    """Rows of P probes in the memory of the device."""

    def __init__(self, features: Tensor, labels: Tensor, size: int) -> None:
        """Take them as they are.

        Args:
            features: (P, n, D) fp32 or fp64, the last channel ones.
            labels: (n,) int64 from 0.
            size: rows of a chunk.
        """
        self.features, self.labels, self.size = features, labels, size
        self.probes, self.channels = len(features), features.shape[2]
        self.dtype, self.device = features.dtype, features.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (P, b, D) and labels (b,)."""
        yield from zip(self.features.split(self.size, dim=1), self.labels.split(self.size), strict=True)

    def drop(self, moves: Sequence[tuple[int, int]], number: int) -> None:
        """Keep the first `number` probes, after moving others (place, from where) among them."""
        self.features = moved(self.features, moves, number)


class Streamed:
    """Rows of one probe in a file that is read from start to end for each sum; see `streamed`."""

    probes = 1

    def __init__(self, file: IO[bytes], channels: int, labels: Tensor, size: int, dtype: torch.dtype) -> None:
        """Read nothing yet.

        Args:
            file: (n, D) numbers of the dtype, the last channel ones.
            channels: D.
            labels: (n,) int64 from 0, on the device that chunks come to.
            size: rows of a chunk.
            dtype: fp32 or fp64.
        """
        self.file, self.channels, self.labels, self.size = file, channels, labels, size
        self.dtype, self.device = dtype, labels.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (1, b, D) and labels (b,)."""
        self.file.seek(0)
        for labels in self.labels.split(self.size):
            read = np.fromfile(self.file, _numpy(self.dtype), len(labels) * self.channels)
            yield torch.from_numpy(read.reshape(1, len(labels), self.channels)).to(self.device), labels

    def drop(self, moves: Sequence[tuple[int, int]], number: int) -> None:
        """Nothing is held that could be let go."""


def resident(places: Sequence[Features], labels: Tensor, size: int, dtype: torch.dtype) -> Resident:
    """Read places of equal shape (n, d) to the device of the labels; D is d + 1."""
    number, dim = places[0].shape
    batch = torch.ones(len(places), number, dim + 1, dtype=dtype, device=labels.device)
    for place, rows in zip(places, batch, strict=True):
        for start, block in place.blocks():
            rows[start : start + len(block), :-1] = torch.from_numpy(block)
    return Resident(batch, labels, size)


@contextmanager
def streamed(
    place: Features, labels: Tensor, size: int, dtype: torch.dtype, folder: Path | None
) -> Iterator[Streamed]:
    """Prepare a place (n, d) once, in a nameless file that is gone at the end; D is d + 1.

    To prepare the rows again for each sum takes ten times as long as to read them.

    Args:
        place: of the training images.
        labels: (n,) int64 from 0.
        size: rows of a chunk.
        dtype: fp32 or fp64.
        folder: of the file; None: the system's for temporary ones.

    Raises:
        InputError: there is not enough space.
    """
    number, dim = place.shape
    needed, where = dtype.itemsize * number * (dim + 1), folder or Path(gettempdir())
    free = shutil.disk_usage(where).free
    if needed > free:
        raise InputError(
            f"{where}: the rows of {place.name} take {needed / 1e9:.1f} GB while a probe is fitted, "
            f"{free / 1e9:.1f} GB are free; make room"
        )
    with TemporaryFile(dir=where) as file:
        for _, block in place.blocks():
            rows = np.ones((len(block), dim + 1), _numpy(dtype))
            rows[:, :-1] = block
            file.write(rows.tobytes())
        yield Streamed(file, dim + 1, labels, size, dtype)


def _numpy(dtype: torch.dtype) -> type[np.float32] | type[np.float64]:
    return np.float32 if dtype == torch.float32 else np.float64
