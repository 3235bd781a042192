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
TAP_UNITS = 256  # the weights of a blur are whole and sum to this, as in OpenCV's blur of 8-bit images
LOWERED = 128  # levels by which a blur is computed lower
NO_TIE = 1 / (2 * TAP_UNITS**2)  # levels; half the least step of a blur's sums
HUE_STEPS, CIRCLE = 255, 360  # Pillow's hue and OpenCV's
# OpenCV's HSV (hue in degrees, saturation to 1, value in levels) to Pillow's steps not yet truncated; back.
TO_STEPS = np.array([[HUE_STEPS / CIRCLE, 0, 0, 0], [0, 255, 0, 1e-3], [0, 0, 1, 0]], np.float32)
FROM_STEPS = np.array([[CIRCLE / HUE_STEPS, 0, 0], [0, 1 / 255, 0], [0, 0, 1]], np.float32)


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
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    steps = cv2.transform(hsv, TO_STEPS).astype(np.uint8)
    steps[..., 0] += np.uint8(int(shift * 255) & 255)  # wraps at 256, as Pillow's channel does
    hsv = cv2.transform(steps.astype(np.float32), FROM_STEPS)
    return np.asarray(cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)), np.uint8)


def to_gray(image: Pixels) -> Pixels:
    """Luma (ITU-R 601) in all three channels."""
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), np.uint8)


def blur(image: Pixels, sigma: float) -> Pixels:
    """Gaussian blur, `sigma` in pixels, mirrored at the edge pixel.

    Has the levels of OpenCV's GaussianBlur on 8 bits, in half the time. Between -128 and 127 the sums are
    exact in float32, and half of their least step turns every tie upwards: OpenCV would round it to even.
    """
    taps = blur_taps(sigma)
    if taps[-1] == TAP_UNITS:
        return image.copy()
    row = np.array([*taps, *taps[-2::-1]], np.float32) / TAP_UNITS
    border, delta = cv2.BORDER_REFLECT_101, NO_TIE - LOWERED
    lowered = cv2.sepFilter2D(image, cv2.CV_16S, row, row, delta=delta, borderType=border)
    blurred = cv2.convertScaleAbs(lowered, alpha=1, beta=LOWERED)
    return np.asarray(blurred, np.uint8).reshape(image.shape)  # OpenCV drops a single channel's axis


def blur_taps(sigma: float) -> list[int]:
    """Weights of the blur from the edge to the centre, in units of 1 / 256.

    Each is rounded with the remainder of those before it, and the centre gets what is left.
    """
    kernel = cv2.getGaussianKernel(BLUR_KERNEL, sigma, cv2.CV_64F)[:, 0].tolist()
    taps, remainder = [], 0.0
    for weight in kernel[: BLUR_KERNEL // 2]:
        exact = weight * TAP_UNITS + remainder
        taps.append(round(exact))
        remainder = exact - taps[-1]
    return [*taps, TAP_UNITS - 2 * sum(taps)]


def solarize(image: Pixels) -> Pixels:
    """Invert the levels from 128 up."""
    return np.asarray(cv2.LUT(image, SOLARIZE_TABLE), np.uint8).reshape(image.shape)


def _blend_with_level(image: Pixels, level: int, factor: float) -> Pixels:
    table = level + np.float32(factor) * (LEVELS - level)
    levels = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))
    return np.asarray(levels, np.uint8).reshape(image.shape)
