"""Pixel operations of the augmentation on uint8: (H, W, C) in, a new (H, W, C) out.

Brightness, contrast, blur and solarize take any number of channels, the others RGB.
They give what Pillow gives with the same parameters, to a fraction of a grey level. Pillow's blends truncate
to whole levels; rounding instead would make images half a level brighter with each operation.
"""

import cv2
import numpy as np

from pretrain.data.pixels import Pixels

LEVELS = np.arange(256, dtype=np.float32)
BLUR_KERNEL = 9  # pixels; DINOv2's
SOLARIZE_TABLE = np.where(LEVELS < 128, LEVELS, 255 - LEVELS).astype(np.uint8)
# Added before OpenCV rounds to nearest, to truncate. Not -0.5, which would lower half of the whole values.
TRUNCATE = -0.499


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Blend with black: `factor` times the image."""
    return _blend_with_level(image, 0, factor)


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Blend with the image's mean level: of its luma, or over all channels where they are no colours."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[2] == 3 else image
    level = int(cv2.mean(gray.reshape(len(gray), -1))[0] + 0.5)
    return _blend_with_level(image, level, factor)


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    """Blend with the grey image."""
    return np.asarray(cv2.addWeighted(to_gray(image), 1 - factor, image, factor, TRUNCATE), np.uint8)


def adjust_hue(image: Pixels, shift: float) -> Pixels:
    """Turn the hue by `shift` of a full circle.

    Pillow stores hue and saturation in 255 truncated steps. OpenCV's 8-bit conversion rounds elsewhere (one
    level apart on saturated images), so the conversion runs in float and the truncation is done here.
    """
    # Hue in degrees, saturation in [0, 1], value as it is.
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    hue = (cv2.extractChannel(hsv, 0) * np.float32(255 / 360)).astype(np.uint8)
    hue += np.uint8(int(shift * 255) & 255)  # wraps at 256, as Pillow's channel does
    saturation = (cv2.extractChannel(hsv, 1) * np.float32(255) + np.float32(1e-3)).astype(np.uint8)
    cv2.insertChannel(hue * np.float32(360 / 255), hsv, 0)
    cv2.insertChannel(saturation * np.float32(1 / 255), hsv, 1)
    return np.asarray(cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)), np.uint8)


def to_gray(image: Pixels) -> Pixels:
    """Luma (ITU-R 601) in all three channels."""
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), np.uint8)


def blur(image: Pixels, sigma: float) -> Pixels:
    """Gaussian blur, `sigma` in pixels, mirrored at the edge pixel."""
    kernel = (BLUR_KERNEL, BLUR_KERNEL)
    blurred = cv2.GaussianBlur(image, kernel, sigma, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(blurred, np.uint8).reshape(image.shape)  # OpenCV drops a single channel's axis


def solarize(image: Pixels) -> Pixels:
    """Invert the levels from 128 up."""
    return np.asarray(cv2.LUT(image, SOLARIZE_TABLE), np.uint8).reshape(image.shape)


def _blend_with_level(image: Pixels, level: int, factor: float) -> Pixels:
    table = level + np.float32(factor) * (LEVELS - level)
    levels = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))
    return np.asarray(levels, np.uint8).reshape(image.shape)
