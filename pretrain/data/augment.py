"""DINOv2's multi-crop augmentation: one image in, two global and some local crops out.

All draws of an image come first (`drawn.py`), then the pixels: box, resize, flip, colour jitter, grayscale,
blur, solarize. What follows the resizing can also run on the device, for a whole batch (`device_augment.py`).
"""

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
    for kind, out in zip(draws, (global_out, local_out), strict=True):
        for draw, planes in zip(kind, out, strict=True):
            _to_planes(apply(image, draw, planes.shape[-1]), planes)


def cut(image: Pixels, draws: Draws, global_out: Pixels, local_out: Pixels) -> tuple[Rows, Rows]:
    """The first half of `augment`: boxes and resizing; `augment_on_device` does the rest.

    Returns:
        (2, P) and (L, P) float32, the rest of the draws of the global and of the local crops.
    """
    for kind, out in zip(draws, (global_out, local_out), strict=True):
        for draw, planes in zip(kind, out, strict=True):
            _to_planes(_resized(image, draw.box, planes.shape[-1]), planes)
    return encode_draws(draws[0]), encode_draws(draws[1])


def apply(image: Pixels, draw: CropDraw, size: int) -> Pixels:
    """One crop, (size, size, C) uint8, of an (H, W, C) image."""
    crop = _resized(image, draw.box, size)
    if draw.flip:
        crop = np.asarray(cv2.flip(crop, 1), np.uint8).reshape(crop.shape)
    for name, amount in draw.jitter:
        crop = _adjust(crop, name, amount)
    if draw.grayscale:
        crop = colour.to_gray(crop)
    if draw.sigma is not None:
        crop = colour.blur(crop, draw.sigma)
    return colour.solarize(crop) if draw.solarize else crop


def _resized(image: Pixels, box: Box, size: int) -> Pixels:
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


def _adjust(crop: Pixels, name: Adjustment, amount: float) -> Pixels:
    match name:
        case "brightness":
            return colour.adjust_brightness(crop, amount)
        case "contrast":
            return colour.adjust_contrast(crop, amount)
        case "saturation":
            return colour.adjust_saturation(crop, amount)
        case "hue":
            return colour.adjust_hue(crop, amount)


def _to_planes(crop: Pixels, planes: Pixels) -> None:
    """(S, S, C) to (C, S, S); OpenCV is several times as fast at this as a strided copy."""
    for channel in range(len(planes)):
        cv2.extractChannel(crop, channel, planes[channel])
