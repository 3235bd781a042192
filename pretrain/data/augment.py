"""DINOv2's multi-crop augmentation: one image in, two global and some local crops out.

All draws of an image come first (`drawn.py`), then the pixels: box, resize, flip, colour jitter, grayscale,
blur, solarize. What follows the resizing can also run on the device, for a whole batch (`device_augment.py`).
"""

from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
from torch.nn import functional

from pretrain.data import colour
from pretrain.data.draw_params import Rows, encode_draws
from pretrain.data.draws import Adjustment, Box, CropDraw, Draws
from pretrain.data.pixels import Pixels


def augment(image: Pixels, draws: Draws, global_out: Pixels, local_out: Pixels) -> None:
    """Cut and change the crops of one image.

    Args:
        image: (H, W, C) uint8.
        draws: of its crops, from `decode_and_draw`.
        global_out: (2, C, S, S) uint8, filled with the global crops.
        local_out: (L, C, s, s) uint8, filled with the local crops.
    """
    pairs = list(_pairs(draws, global_out, local_out))
    crops = [cut_box(image, draw.box, planes.shape[-1]) for draw, planes in pairs]
    for change in CHANGES.values():  # one change for all crops: its code and tables stay in the caches
        crops = [change(crop, draw) for crop, (draw, _) in zip(crops, pairs, strict=True)]
    for crop, (_, planes) in zip(crops, pairs, strict=True):
        to_planes(crop, planes)


def cut(image: Pixels, draws: Draws, global_out: Pixels, local_out: Pixels) -> tuple[Rows, Rows]:
    """The first half of `augment`: boxes and resizing; `augment_on_device` does the rest.

    Returns:
        (2, P) and (L, P) float32, the rest of the draws of the global and of the local crops.
    """
    for draw, planes in _pairs(draws, global_out, local_out):
        to_planes(cut_box(image, draw.box, planes.shape[-1]), planes)
    return encode_draws(draws[0]), encode_draws(draws[1])


def apply(image: Pixels, draw: CropDraw, size: int) -> Pixels:
    """One crop, (size, size, C) uint8, of an (H, W, C) image."""
    crop = cut_box(image, draw.box, size)
    for change in CHANGES.values():
        crop = change(crop, draw)
    return crop


def _pairs(draws: Draws, global_out: Pixels, local_out: Pixels) -> Iterator[tuple[CropDraw, Pixels]]:
    """Each crop's draw with where it goes."""
    for kind, out in zip(draws, (global_out, local_out), strict=True):
        yield from zip(kind, out, strict=True)


def cut_box(image: Pixels, box: Box, size: int) -> Pixels:
    """The part of an image in a box, as (size, size, C)."""
    return resize(image[box.top : box.top + box.height, box.left : box.left + box.width], size)


def resize(image: Pixels, size: int) -> Pixels:
    """(h, w, C) to (size, size, C), bicubic with antialiasing, as Pillow resizes a crop."""
    if image.shape[:2] == (size, size):
        return np.ascontiguousarray(image)
    height, width, channels = image.shape
    pixels = torch.from_numpy(np.ascontiguousarray(image)).view(1, height, width, channels)
    planes = pixels.permute(0, 3, 1, 2)  # channels last, and so is what comes out: no copy on either side
    resized = functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def to_planes(crop: Pixels, planes: Pixels) -> None:
    """(S, S, C) to (C, S, S); OpenCV is many times as fast at this as a strided copy."""
    cv2.split(crop, list(planes))


def _flip(crop: Pixels, draw: CropDraw) -> Pixels:
    return np.asarray(cv2.flip(crop, 1), np.uint8).reshape(crop.shape) if draw.flip else crop


def _jitter(crop: Pixels, draw: CropDraw) -> Pixels:
    for name, amount in draw.jitter:
        crop = ADJUST[name](crop, amount)
    return crop


def _grayscale(crop: Pixels, draw: CropDraw) -> Pixels:
    return colour.to_gray(crop) if draw.grayscale else crop


def _blur(crop: Pixels, draw: CropDraw) -> Pixels:
    return crop if draw.sigma is None else colour.blur(crop, draw.sigma)


def _solarize(crop: Pixels, draw: CropDraw) -> Pixels:
    return colour.solarize(crop) if draw.solarize else crop


ADJUST: dict[Adjustment, Callable[[Pixels, float], Pixels]] = {
    "brightness": colour.adjust_brightness,
    "contrast": colour.adjust_contrast,
    "saturation": colour.adjust_saturation,
    "hue": colour.adjust_hue,
}
CHANGES: dict[str, Callable[[Pixels, CropDraw], Pixels]] = {  # of a resized crop, in their order
    "flip": _flip,
    "jitter": _jitter,
    "grayscale": _grayscale,
    "blur": _blur,
    "solarize": _solarize,
}
