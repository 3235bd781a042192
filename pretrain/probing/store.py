"""Pooled features of a whole set of images on the disk: written batch by batch, read place by place."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.analysis.taps import Place, pooled_features, width
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer
from pretrain.probing.preprocessing import Array, Features
from pretrain.run.durable import write_text

Pool = Literal["cls", "patch_mean", "all_mean", "cls+patch_mean"]
Floats = NDArray[np.float32]
COMPLETE = "complete.json"  # written last: a folder without it is begun anew
LABELS = "labels.i64"
BYTES = 4  # of a number: fp32
GAP = 8  # rows that are not asked for are read with others up to here: a read for each would take longer


@dataclass(frozen=True)
class Contents:
    """What a folder of features holds."""

    key: str  # of weights, images and their preparation
    images: int
    patches: int  # of an image


class FileRows:
    """An array (n, width) in a file, of which only rows that are asked for are read into memory."""

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self.shape = (number, path.stat().st_size // BYTES // number)

    def __len__(self) -> int:
        """Rows n."""
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Floats:
        """Consecutive rows, or ascending ones: then those in small gaps between them are read as well."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._span(start, stop)
        if not len(rows):
            return np.empty((0, self.shape[1]), np.float32)
        found = np.empty((len(rows), self.shape[1]), np.float32)
        starts = [0, *(np.flatnonzero(np.diff(rows) > GAP) + 1), len(rows)]
        for start, stop in pairwise(starts):
            near = rows[start:stop]
            found[start:stop] = self._span(int(near[0]), int(near[-1]) + 1)[near - near[0]]
        return found

    def _span(self, start: int, stop: int) -> Floats:
        width = self.shape[1]
        count, offset = max(0, stop - start) * width, start * width * BYTES
        return np.fromfile(self.path, np.float32, count, offset=offset).reshape(-1, width)


class FeatureSet:
    """Features of n images: for each place a file of class token beside mean patch, (n, 2 D')."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder, self.contents = folder, contents

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) class numbers."""
        return np.fromfile(self.folder / LABELS, np.int64)

    def features(self, place: Place, pool: Pool, rows: NDArray[np.int64] | None = None) -> Features:
        """Features (n, D') of one place, (n, 2 D') for `cls+patch_mean`; read as they are needed.

        `all_mean` is the mean over class token and patches, as in the paper; registers are never in it.
        """
        file = cast(Array, FileRows(_path(self.folder, place), self.contents.images))
        return Features(str(place), lambda: file, rows, (partial(_pooled, pool, self.contents.patches),))


def _pooled(pool: Pool, patches: int, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """(b, 2 D') to what a pool makes of class token and mean patch."""
    cls, mean = np.split(rows, 2, axis=1)
    match pool:
        case "cls":
            return cls
        case "patch_mean":
            return mean
        case "all_mean":
            return (cls + patches * mean) / (patches + 1)
        case "cls+patch_mean":
            return rows


def open_features(folder: Path, key: str) -> FeatureSet | None:
    """What `extract` has completed there with the same key, or None."""
    try:
        contents = Contents(**json.loads((folder / COMPLETE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return FeatureSet(folder, contents) if contents.key == key else None


def extract(
    backbone: VisionTransformer,
    wanted: Sequence[Place],
    batches: Iterable[tuple[Tensor, Tensor]],
    number: int,
    folder: Path,
    key: str,
    advance: Callable[[int], None] = lambda _: None,
) -> FeatureSet:
    """Run images through a backbone once and keep pooled features of all places on the disk.

    In memory is one batch. What an interrupted extraction left is removed.

    Args:
        backbone: on any device.
        wanted: places of the model.
        batches: images (b, C, S, S') and labels (b,).
        number: of images, for the space that is needed.
        folder: for this set alone.
        key: of weights, images and their preparation.
        advance: told of images.

    Raises:
        InputError: there is not enough space, or no image.
    """
    _make_room(backbone, wanted, number, folder)
    device, patches, seen = next(backbone.parameters()).device, 0, 0
    for images, labels in batches:
        pooled = pooled_features(backbone, images.to(device), wanted)
        for place, features in pooled.items():
            _append(_path(folder, place), torch.cat(features, dim=1).cpu().numpy())
        _append(folder / LABELS, labels.numpy().astype(np.int64))
        patches = (images.shape[-2] // backbone.patch_size) * (images.shape[-1] // backbone.patch_size)
        seen += len(images)
        advance(len(images))
    if not seen:
        raise InputError(f"{folder.name}: there is no image")
    contents = Contents(key, seen, patches)
    write_text(folder / COMPLETE, json.dumps(asdict(contents)) + "\n")
    return FeatureSet(folder, contents)


def _make_room(backbone: VisionTransformer, wanted: Sequence[Place], number: int, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed = 2 * BYTES * number * sum(width(backbone.cfg, place.point) for place in wanted)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: the features of {number} images at {len(wanted)} places take {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; choose another --out, fewer --blocks or --points"
        )


def _path(folder: Path, place: Place) -> Path:
    return folder / f"{place}.f32"


def _append(path: Path, values: NDArray[np.generic]) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(values).tobytes())
