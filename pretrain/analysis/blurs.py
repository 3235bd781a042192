"""The blurs of CIFAR-10-C: of (H, W, C) float32 images with any number of channels, to a new image.

The arithmetic is that of Hendrycks and Dietterich (Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations, 2019), whose motion blur is ImageMagick's.
"""

from math import ceil, cos, radians, sin
from typing import Any

import cv2
import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]

TRUNCATE = 4  # standard deviations after which a Gaussian kernel ends
ZOOM_STEP = 0.01
GLASS_MARGIN = 2  # rows and columns that are not displaced


def gaussian_blur(image: Floats, sd: float) -> Floats:
    """Gaussian blur, `sd` in pixels; the edge pixel goes on beyond the edge."""
    size = 2 * int(TRUNCATE * sd + 0.5) + 1
    blurred = cv2.GaussianBlur(image, (size, size), sd, borderType=cv2.BORDER_REPLICATE)
    return _same_shape(blurred, image)


def defocus_kernel(radius: float, alias: float) -> Floats:
    """A disk of `radius` pixels smoothed by a 3 x 3 Gaussian of sd `alias`: (k, k), sums to 1."""
    reach = int(radius) + 1  # one more than the disk's, for the smoothing
    squares = np.arange(-reach, reach + 1) ** 2
    disk = (squares[:, None] + squares <= radius**2).astype(np.float32)
    smooth = cv2.GaussianBlur(disk / disk.sum(), (3, 3), alias, borderType=cv2.BORDER_CONSTANT)
    return np.asarray(smooth, np.float32)


def defocus_blur(image: Floats, radius: float, alias: float) -> Floats:
    """Out of focus: the image filtered with `defocus_kernel`, mirrored at the edge pixel."""
    return _same_shape(cv2.filter2D(image, -1, defocus_kernel(radius, alias)), image)


def motion_taps(radius: int, sd: float, angle: float) -> list[tuple[float, int, int]]:
    """(weight, rows down, columns right) of each pixel that a motion blur sums; the weights sum to 1.

    As in ImageMagick, the line lies on one side: 2 * radius + 1 pixels from the pixel itself on, each the
    nearest to a point of the line, with half a Gaussian as weights.

    Args:
        radius: pixels.
        sd: of the Gaussian, pixels.
        angle: degrees; 0 points to the right, 90 down.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sd**2))
    down, right = sin(radians(angle)), cos(radians(angle))
    return [
        (weight, ceil(step * down - 0.5), ceil(step * right - 0.5))
        for step, weight in enumerate((weights / weights.sum()).tolist())
    ]


def motion_blur(image: Floats, radius: int, sd: float, angle: float) -> Floats:
    """Motion along a line: the sum over `motion_taps`; the edge pixel goes on beyond the edge."""
    (height, width, _), margin = image.shape, 2 * radius
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    blurred = np.zeros_like(image)
    for weight, down, right in motion_taps(radius, sd, angle):
        top, left = margin + down, margin + right
        blurred += weight * padded[top : top + height, left : left + width]
    return blurred


def zoom_blur(image: Floats, largest: float) -> Floats:
    """The mean of the image and of its copies enlarged by 1, 1.01 ... `largest`.

    The image counts twice. Rounding decides whether `largest` itself is among the factors, here as in
    the published code: 1.06 and 1.11 are, while the factors below 1.16, 1.21 and 1.26 end .01 before.
    """
    factors = np.arange(1, largest, ZOOM_STEP).tolist()
    total = image.copy()
    for factor in factors:
        total += _enlarged(image, factor)
    return total / np.float32(len(factors) + 1)


def _enlarged(image: Floats, factor: float) -> Floats:
    """The centre of an image, enlarged to its size by linear interpolation between centres of pixels."""
    height, width, _ = image.shape
    (down, top), (right, left) = _sampling(height, factor), _sampling(width, factor)
    enlarged = cv2.warpAffine(
        image,
        np.array([[right, 0, left], [0, down, top]]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return _same_shape(enlarged, image)


def _sampling(length: int, factor: float) -> tuple[float, float]:
    """(step, start) of the source pixels of an axis: scipy.ndimage.zoom's, for a factor below 1.5."""
    cut = ceil(length / factor)
    grown = round(cut * factor)  # length or one more: that one is left off at the end
    return (cut - 1) / max(1, grown - 1), (length - cut) // 2


def glass_blur(image: Floats, sd: float, iterations: int, rng: np.random.Generator) -> Floats:
    """Frosted glass: blurred, each pixel replaced `iterations` times by a neighbour, blurred again.

    The published loop swaps each pixel, from the last to the first, with itself or the neighbour above, to
    the left or both. As it is written, it only copies (the rows of a NumPy array are views), and from pixels
    that it has not reached yet. So it equals one gather per iteration, as here. The first rows and columns
    stay.

    Args:
        image: (H, W, C).
        sd: of both blurs, pixels.
        iterations: rounds of displacement.
        rng: of the displacements.
    """
    moved, (height, width, _) = gaussian_blur(image, sd), image.shape
    rows, columns = np.indices((height, width))
    for _ in range(iterations):
        up, left = rng.integers(0, 2, (2, height, width))
        inner = (rows >= GLASS_MARGIN) & (columns >= GLASS_MARGIN)
        moved = moved[rows - up * inner, columns - left * inner]
    return gaussian_blur(moved, sd)


def _same_shape(pixels: Any, image: Floats) -> Floats:
    """OpenCV's result in the shape of the image: it drops a single channel's axis."""
    return np.asarray(pixels, np.float32).reshape(image.shape)
