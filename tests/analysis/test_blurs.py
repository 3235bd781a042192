"""Blurs: weights of sum one, the published arithmetic in slow and plain ways, the direction of motion."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from pretrain.analysis.blurs import (
    Floats,
    defocus_blur,
    defocus_kernel,
    gaussian_blur,
    glass_blur,
    motion_blur,
    motion_taps,
    zoom_blur,
)
from pretrain.analysis.corruptions import DEFOCUS_BLUR, MOTION_BLUR, Corruption, corrupt
from tests.analysis.small_images import photos

BLURS: dict[str, Callable[[Floats], Floats]] = {
    "gaussian": lambda image: gaussian_blur(image, 1.0),
    "defocus": lambda image: defocus_blur(image, 1.5, 0.1),
    "motion": lambda image: motion_blur(image, 9, 2.5, 30.0),
    "zoom": lambda image: zoom_blur(image, 1.26),
    "glass": lambda image: glass_blur(image, 0.4, 2, np.random.default_rng(0)),
}


def image_of(index: int, size: int = 32) -> Floats:
    return photos(size)[index].astype(np.float32) / 255


@pytest.mark.parametrize("radius, alias", DEFOCUS_BLUR)
def test_the_defocus_kernel_is_a_symmetric_disk_of_sum_one(radius: float, alias: float) -> None:
    kernel = defocus_kernel(radius, alias)
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    assert np.array_equal(kernel, kernel[::-1]) and np.allclose(kernel, kernel.T)
    size = len(kernel)
    disk = np.zeros((size + 10, size + 10))  # far from any edge
    for row, column in np.ndindex(disk.shape):
        disk[row, column] = np.hypot(row - size // 2 - 5, column - size // 2 - 5) <= radius
    weights = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias**2))
    weights /= weights.sum()
    expected = ndimage.convolve(disk / disk.sum(), np.outer(weights, weights))
    assert expected[5:-5, 5:-5].sum() == pytest.approx(1) and np.allclose(
        kernel, expected[5:-5, 5:-5], atol=1e-6
    )


@pytest.mark.parametrize("radius, sd", MOTION_BLUR)
@pytest.mark.parametrize("angle", [-45.0, 0.0, 17.0, 90.0])
def test_motion_follows_a_line_with_weights_of_sum_one(radius: int, sd: float, angle: float) -> None:
    weights, down, right = map(np.array, zip(*motion_taps(radius, sd, angle), strict=True))
    assert weights.sum() == pytest.approx(1) and (np.diff(weights) < 0).all()
    assert weights[1] / weights[0] == pytest.approx(np.exp(-1 / (2 * sd**2)))
    steps, turn = np.arange(2 * radius + 1), np.radians(angle)
    assert np.abs(right - steps * np.cos(turn)).max() <= 0.5 + 1e-9
    assert np.abs(down - steps * np.sin(turn)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("name", BLURS)
def test_a_flat_image_stays_flat(name: str) -> None:
    image = np.full((20, 27, 3), 0.3, np.float32)
    assert np.allclose(BLURS[name](image), image, atol=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "defocus", "motion"])
def test_light_away_from_the_borders_is_kept(name: str) -> None:
    image = np.zeros((80, 80, 3), np.float32)
    image[24:56, 24:56] = image_of(0)
    blurred = BLURS[name](image)
    assert np.allclose(blurred.sum((0, 1)), image.sum((0, 1)), rtol=1e-5)
    assert blurred.std() < 0.97 * image.std()


@pytest.mark.parametrize("sd", [0.05, 0.4, 0.6, 0.7, 0.8, 1.0])
def test_the_gaussian_blur_is_scipys(sd: float) -> None:
    image = image_of(1)
    expected = ndimage.gaussian_filter(image, (sd, sd, 0), mode="nearest", truncate=4)
    assert np.allclose(gaussian_blur(image, sd), expected, atol=2e-5)


def test_defocus_mirrors_at_the_edge_pixel() -> None:
    image, kernel = image_of(2), defocus_kernel(1.5, 0.1)
    expected = ndimage.correlate(image, kernel[..., None], mode="mirror")
    assert np.allclose(defocus_blur(image, 1.5, 0.1), expected, atol=1e-5)


def test_motion_blur_sums_the_pixels_of_its_line() -> None:
    image, size = image_of(3), 32
    expected = np.zeros_like(image)
    for weight, down, right in motion_taps(8, 2.0, -33.0):
        for row, column in np.ndindex(size, size):
            source = min(max(row + down, 0), size - 1), min(max(column + right, 0), size - 1)
            expected[row, column] += weight * image[source]
    assert np.allclose(motion_blur(image, 8, 2.0, -33.0), expected, atol=1e-5)


@pytest.mark.parametrize("severity", [1, 5])
def test_motion_is_drawn_between_minus_and_plus_45_degrees(severity: int) -> None:
    pixels = np.zeros((65, 65, 1), np.uint8)
    pixels[32, 32] = 255
    offsets = np.arange(65) - 32
    angles = []
    for key in range(120):
        trail = corrupt(pixels, Corruption("motion_blur", severity), key)[..., 0].astype(float)
        down, right = (trail.sum(1) @ offsets) / trail.sum(), (trail.sum(0) @ offsets) / trail.sum()
        assert right < 0  # the pixels to the right come to the left
        angles.append(np.degrees(np.arctan2(-down, -right)))
    assert max(map(abs, angles)) < 50  # pixels are whole: a short line is not exactly at its angle
    assert min(angles) < -35 and max(angles) > 35 and abs(np.mean(angles)) < 8


@pytest.mark.parametrize("largest, count", [(1.06, 7), (1.11, 12), (1.16, 16), (1.21, 21), (1.26, 26)])
@pytest.mark.parametrize("width", [32, 23])
def test_zoom_is_the_mean_of_scipys_enlargements(largest: float, count: int, width: int) -> None:
    image = image_of(4)[:, :width]
    total = image.copy()
    factors = np.arange(1, largest, 0.01)
    assert len(factors) == count
    for factor in factors:
        cuts = [
            slice((n - cut) // 2, (n - cut) // 2 + cut)
            for n in (32, width)
            for cut in [int(np.ceil(n / factor))]
        ]
        grown = ndimage.zoom(image[cuts[0], cuts[1]], (factor, factor, 1), order=1)
        top, left = ((have - want) // 2 for have, want in zip(grown.shape, (32, width), strict=False))
        total += grown[top : top + 32, left : left + width]
    # older OpenCVs interpolate in steps of a 32nd of a pixel
    assert np.allclose(zoom_blur(image, largest), total / (count + 1), atol=0.01)


@pytest.mark.parametrize("sd, iterations", [(0.05, 1), (0.4, 2)])
def test_glass_equals_the_published_loop(sd: float, iterations: int) -> None:
    """Its exchange of two rows of an array copies one way only, from the last pixel to the first."""
    image, draws = image_of(5), np.random.default_rng(7)
    expected = gaussian_blur(image, sd)
    for _ in range(iterations):
        up, left = draws.integers(0, 2, (2, 32, 32))
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                other = row - up[row, column], column - left[row, column]
                expected[row, column], expected[other] = expected[other], expected[row, column]
    expected = gaussian_blur(expected, sd)
    assert np.array_equal(glass_blur(image, sd, iterations, np.random.default_rng(7)), expected)
    assert not np.allclose(expected, image, atol=0.05)
