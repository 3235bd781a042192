"""Pooled features of a whole set of images on the disk: written batch by batch, read place by place."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pretrain.analysis.taps import Place, pooled_features, width
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer
from pretrain.run.durable import write_text

Pool = Literal["cls", "patch_mean", "all_mean", "cls+patch_mean"]
Floats = NDArray[np.float32]
COMPLETE = "complete.json"  # written last: a folder without it is begun anew
LABELS = "labels.i64"
BYTES = 4  # of a number: fp32


@dataclass(frozen=True)
class Contents:
    """What a folder of features holds."""

    key: str  # of weights, images and their preparation
    images: int
    patches: int  # of an image


class FeatureSet:
    """Features of n images: for each place a file of class tokens and one of mean patches, both (n, D')."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder, self.contents = folder, contents

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) class numbers."""
        return np.fromfile(self.folder / LABELS, np.int64)

    def read(self, place: Place, pool: Pool) -> Floats:
        """(n, D') of one place; (n, 2 D') for `cls+patch_mean`.

        `all_mean` is the mean over class token and patches, as in the paper; registers are never in it.
        """
        match pool:
            case "cls" | "patch_mean":
                return self._file(place, pool)
            case "all_mean":
                number = self.contents.patches
                mean = self._file(place, "patch_mean")
                mean *= number / (number + 1)
                mean += self._file(place, "cls") / (number + 1)
                return mean
            case "cls+patch_mean":
                return np.concatenate([self._file(place, "cls"), self._file(place, "patch_mean")], axis=1)

    def _file(self, place: Place, token: Literal["cls", "patch_mean"]) -> Floats:
        return np.fromfile(_path(self.folder, place, token), np.float32).reshape(self.contents.images, -1)


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
            _append(_path(folder, place, "cls"), features.cls.cpu().numpy())
            _append(_path(folder, place, "patch_mean"), features.patch_mean.cpu().numpy())
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


def _path(folder: Path, place: Place, token: Literal["cls", "patch_mean"]) -> Path:
    return folder / f"{place}.{token}.f32"


def _append(path: Path, values: NDArray[np.generic]) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(values).tobytes())
