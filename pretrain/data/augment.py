"""DINOv2's multi-crop augmentation: one image in, two global and some local crops out.

All draws of an image come first (`draws.py`), then the pixels: box, resize, flip, colour jitter, grayscale,
blur, solarize.
"""

import cv2
import numpy as np
import torch
from torch.nn import functional

from pretrain.config.schema import DataConfig
from pretrain.data import colour
from pretrain.data.decode import Pixels
from pretrain.data.draws import Adjustment, CropDraw, draw_crops


def augment(
    image: Pixels, cfg: DataConfig, rng: np.random.Generator, global_out: Pixels, local_out: Pixels
) -> None:
    """Cut and change the crops of one image.

    Args:
        image: (H, W, 3) uint8 RGB.
        cfg: sizes, scales, probabilities.
        rng: all randomness comes from here.
        global_out: (2, 3, S, S) uint8, filled with the global crops.
        local_out: (L, 3, s, s) uint8, filled with the local crops.
    """
    global_draws, local_draws = draw_crops(rng, image.shape[0], image.shape[1], cfg)
    for draws, out in ((global_draws, global_out), (local_draws, local_out)):
        for draw, planes in zip(draws, out, strict=True):
            _to_planes(apply(image, draw, planes.shape[-1]), planes)


def apply(image: Pixels, draw: CropDraw, size: int) -> Pixels:
    """One crop, (size, size, 3) uint8, of an (H, W, 3) image."""
    box = draw.box
    crop = resize(image[box.top : box.top + box.height, box.left : box.left + box.width], size)
    if draw.flip:
        crop = np.asarray(cv2.flip(crop, 1), np.uint8)
    for name, amount in draw.jitter:
        crop = _adjust(crop, name, amount)
    if draw.grayscale:
        crop = colour.to_gray(crop)
    if draw.sigma is not None:
        crop = colour.blur(crop, draw.sigma)
    return colour.solarize(crop) if draw.solarize else crop


def resize(image: Pixels, size: int) -> Pixels:
    """(h, w, 3) to (size, size, 3), bicubic with antialiasing, as Pillow resizes a crop."""
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
    """(S, S, 3) to (3, S, S); OpenCV is several times as fast at this as a strided copy."""
    for channel in range(3):
        cv2.extractChannel(crop, channel, planes[channel])
