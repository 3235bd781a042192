"""Masks beside the images of a folder: the class of each pixel."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.analysis.images import ImageSet
from pretrain.data.decode import DEFAULT
from pretrain.data.formats import FORMATS
from pretrain.data.labelled import centre_crop
from pretrain.data.pixels import check_size
from pretrain.errors import InputError, first_line


def read_masks(folder: Path, images: ImageSet, indices: Sequence[int]) -> Tensor:
    """Masks `NAME.png` of images NAME.jpg, cut like them: (n, size, size) int64.

    Args:
        folder: the same tree as the folder of the images.
        images: of a folder.
        indices: of the images.

    Raises:
        InputError: the images are not in a folder, or a mask is missing or not one channel of classes.
    """
    if not images.files:
        raise InputError("--masks: needs --images to be a folder of files, not shards")
    root = Path(images.source)
    return torch.stack([_mask(folder, images.files[i], root, images.size) for i in indices])


def _mask(folder: Path, image: Path, root: Path, size: int) -> Tensor:
    path = folder / image.relative_to(root).with_suffix(".png")
    try:
        with Image.open(path, formats=FORMATS) as mask, Image.open(image, formats=FORMATS) as shown:
            check_size(*mask.size, DEFAULT.max_pixels)
            if mask.mode not in ("L", "P", "I;16", "I"):
                raise InputError(f"{path}: holds {mask.mode} pixels; a mask has one channel of class numbers")
            if mask.size != shown.size:
                raise InputError(f"{path}: is {mask.size} px, its image {shown.size}")
            pixels = np.array(_resized(mask, size))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        fault = f"cannot be read as the mask of {image.name} ({first_line(error)})"
        raise InputError(f"{path}: {fault}") from error
    return torch.from_numpy(centre_crop(pixels[..., None], size)[..., 0].astype(np.int64))


def _resized(mask: Image.Image, size: int) -> Image.Image:
    """The shorter side made `size` pixels, as images are."""
    short = min(mask.size)
    if short == size:
        return mask
    target = (int(size * mask.width / short), int(size * mask.height / short))
    return mask.resize(target, Image.Resampling.NEAREST)
