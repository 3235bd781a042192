"""Fog and snow over (H, W, C) float32 images from 0 to 1: a new image, not yet clipped to that range."""

import cv2
import numpy as np

from pretrain.analysis.blurs import Floats, motion_blur

WHITEN_GAIN, WHITEN_SHIFT = 1.5, 0.5  # of the luma, as in the published snow: a third of it is white
FALL = (45.0, 135.0)  # degrees of the trails; 90 is straight down


def plasma(size: int, decay: float, rng: np.random.Generator) -> Floats:
    """A plasma fractal by the diamond-square algorithm on a torus: (size, size), from 0 to 1.

    Args:
        size: pixels, a power of two from 2.
        decay: each halving of the distance divides the noise by its square: the published code multiplies a
            uniform draw between -w and w by w, and divides w by the decay.
        rng: of the noise.
    """
    height, step, noise = np.zeros((size, size)), size, 1.0
    while step >= 2:
        half, shape = step // 2, (size // step, size // step)
        corners = height[::step, ::step]
        squares = corners + np.roll(corners, -1, 0)
        centres = (squares + np.roll(squares, -1, 1)) / 4 + rng.uniform(-noise, noise, shape)
        across = corners + np.roll(corners, -1, 1) + centres + np.roll(centres, 1, 0)
        along = corners + np.roll(corners, -1, 0) + centres + np.roll(centres, 1, 1)
        height[half::step, half::step] = centres
        height[::step, half::step] = across / 4 + rng.uniform(-noise, noise, shape)
        height[half::step, ::step] = along / 4 + rng.uniform(-noise, noise, shape)
        step, noise = half, noise / decay**2
    height -= height.min()
    return (height / height.max()).astype(np.float32)


def fog(image: Floats, amplitude: float, decay: float, rng: np.random.Generator) -> Floats:
    """`amplitude` times a plasma fractal added, all scaled so that the brightest level cannot grow.

    The fractal is that of the next power of two: a larger image has finer fog, and clouds of the same share.
    So a dark image becomes brighter, and one brighter than the fog darker.
    """
    height, width, _ = image.shape
    size = max(2, 1 << (max(height, width) - 1).bit_length())
    clouds = plasma(size, decay, rng)[:height, :width, None]
    brightest = image.max()
    return (image + amplitude * clouds) * (brightest / (brightest + amplitude))


def snow_like(
    image: Floats, threshold: float, radius: int, sd: float, whitening: float, rng: np.random.Generator
) -> Floats:
    """Flakes with trails over a partly whitened image, after CIFAR-10-C's snow but with other constants.

    A pixel is a flake where its normal draw passes the threshold; its brightness is the excess, at most 1.
    The flakes are motion-blurred downwards and added to the image.

    Args:
        image: (H, W, 1) grey or (H, W, 3) RGB.
        threshold: standard deviations.
        radius: of the motion blur, pixels.
        sd: of the motion blur, pixels.
        whitening: the share of the whitened image, the brighter of the image and of its luma raised to white.
        rng: of flakes and direction.
    """
    draws = rng.standard_normal((*image.shape[:2], 1), np.float32)
    flakes = np.clip(draws - threshold, 0, 1)
    fallen = motion_blur(flakes, radius, sd, rng.uniform(*FALL))
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if image.shape[2] == 3 else image
    whitened = np.maximum(image, WHITEN_GAIN * luma + WHITEN_SHIFT)
    return image + whitening * (whitened - image) + fallen
