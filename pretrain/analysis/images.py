"""Images of a folder or of shards, in a seeded order, for looking at models; damaged ones are counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.analysis.scaling import Scaling
from pretrain.data.decode import decode
from pretrain.data.inputs.listing import kind_of
from pretrain.data.labelled import centre_crop, resize_shorter
from pretrain.data.order import Permutation
from pretrain.data.reader import Reader
from pretrain.data.shards import list_shards
from pretrain.errors import InputError
from pretrain.export.weights import Weights
from pretrain.seeding import stream_key

RGB = Scaling()  # of the released models


class Stored(NamedTuple):
    """An image as it is stored."""

    name: str  # for messages
    content: bytes
    label: int | None  # of a .cls member, or the place of the class folder among all


class ImageSet:
    """The images of a folder (and its sub-folders) or of tar shards, by position."""

    def __init__(self, source: str, size: int, scaling: Scaling = RGB) -> None:
        """List them; nothing is decoded yet.

        Args:
            source: a folder of image files, or a pattern of shards as in `data.shards`.
            size: pixels of the shorter side, and of the square cut from the centre.
            scaling: of the pixels; its channels are those of the images.

        Raises:
            InputError: there is no image.
        """
        self.source, self.size, self.scaling = source, size, scaling
        self.files: list[Path] = []
        self.reader: Reader | None = None
        if Path(source).is_dir():
            self.files = sorted(path for path in Path(source).rglob("*") if kind_of(path) == "images")
        else:
            self.reader = Reader(list_shards([source], "--images"))
        if not len(self):
            raise InputError(f"--images: {source} holds no image")
        self.classes = _class_folders(Path(source), self.files)
        self.damaged: list[str] = []  # a line each

    def __len__(self) -> int:
        """Number of images, damaged ones too."""
        return sum(self.reader.sizes) if self.reader else len(self.files)

    def read(self, index: int) -> Tensor | None:
        """(C, size, size) float32 normalised, or None for a damaged image, which is noted."""
        try:
            stored = self.stored(index)
        except (ValueError, OSError) as error:
            self.damaged.append(f"image {index}: {error}")
            return None
        return self.decoded(stored)

    def decoded(self, stored: Stored) -> Tensor | None:
        """(C, size, size) float32 normalised, or None for a damaged image, which is noted."""
        try:
            pixels = decode(stored.content, self.scaling.decoding, self.scaling.channels)
            square = centre_crop(resize_shorter(pixels, self.size), self.size)
        except (ValueError, OSError) as error:
            self.damaged.append(f"{stored.name}: {error}")
            return None
        # A copy: a resized picture that needed no cut is read-only.
        return self.scaling.normalised(torch.from_numpy(np.array(square)).permute(2, 0, 1))

    def stored(self, index: int) -> Stored:
        """The bytes of an image.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        if self.reader is None:
            path = self.files[index]
            folder = path.relative_to(self.source).parts[0]
            label = self.classes.index(folder) if self.classes else None
            return Stored(str(path), path.read_bytes(), label)
        for shard, size in enumerate(self.reader.sizes):
            if index < size:
                item = self.reader.read(shard, index)
                return Stored(f"{item.shard}: {item.key}", item.image, item.label)
            index -= size
        raise IndexError(index)

    def batch(self, indices: Sequence[int]) -> Tensor | None:
        """The undamaged ones of these images (B, C, size, size), or None where none is."""
        found = [image for image in map(self.read, indices) if image is not None]
        return torch.stack(found) if found else None

    def chosen(self, places: Sequence[int]) -> tuple[list[int], Tensor]:
        """The undamaged ones of these images: their indices, and (n, C, size, size).

        Raises:
            InputError: all of them are damaged.
        """
        read = {index: self.read(index) for index in places}
        found = {index: image for index, image in read.items() if image is not None}
        if not found:
            raise InputError(f"--images: all that are wanted are damaged, as {self.damaged[0]}")
        return list(found), torch.stack(list(found.values()))

    def drawn(self, seed: int, number: int) -> list[int]:
        """Indices of the first images of the seeded order.

        Raises:
            InputError: there are fewer.
        """
        if len(self) < number:
            raise InputError(f"--images: {self.source} holds {len(self)}, {number} are asked for")
        order = self.shuffled(seed)
        return [order(place) for place in range(number)]

    def held_out(self, seed: int, number: int) -> list[int]:
        """Indices of the last images of the seeded order, which no repair trains on."""
        order = self.shuffled(seed)
        return [order(place) for place in range(len(self) - number, len(self))]

    def shuffled(self, seed: int) -> Permutation:
        """The order in which a repair sees them."""
        return Permutation(len(self), stream_key(seed, "sinder", "images"))


def image_size(weights: Weights, size: int | None = None) -> int:
    """Pixels of a model's images; None = those of the position grid.

    Raises:
        InputError: the size is no multiple of the patch size.
    """
    pixels = weights.model.img_size if size is None else size
    patch = weights.model.patch_size
    if pixels < patch or pixels % patch:
        raise InputError(f"--size: {pixels} px is not a multiple of the patch size {patch}")
    return pixels


def _class_folders(source: Path, files: Sequence[Path]) -> list[str]:
    """Names of the sub-folders of a folder that holds images in sub-folders only, two or more; else none."""
    first = [path.relative_to(source).parts for path in files]
    names = sorted({parts[0] for parts in first if len(parts) > 1})
    return names if len(names) > 1 and all(len(parts) > 1 for parts in first) else []
