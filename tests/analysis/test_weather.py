"""Fog and snow: the fractal by its plain definition, what fog does to dark and bright, flakes that fall."""

import numpy as np
import pytest

from pretrain.analysis.corruptions import SEVERITIES, SNOW_LIKE, Corruption, corrupt
from pretrain.analysis.weather import fog, plasma, snow_like
from tests.analysis.small_images import photos


def plain_plasma(size: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Diamond and square, point by point, with neighbours on a torus."""
    height, step, noise = np.zeros((size, size)), size, 1.0

    def fill(top: int, left: int, neighbours: list[tuple[int, int]]) -> None:
        draws = rng.uniform(-noise, noise, (size // step, size // step))
        for i, j in np.ndindex(draws.shape):
            row, column = top + i * step, left + j * step
            around = [height[(row + down) % size, (column + right) % size] for down, right in neighbours]
            height[row, column] = sum(around) / 4 + draws[i, j]

    while step >= 2:
        half = step // 2
        beside = [(-half, 0), (half, 0), (0, -half), (0, half)]
        fill(half, half, [(-half, -half), (-half, half), (half, -half), (half, half)])
        fill(0, half, beside)
        fill(half, 0, beside)
        step, noise = half, noise / decay**2
    return (height - height.min()) / (height.max() - height.min())


@pytest.mark.parametrize("size, decay", [(2, 3.0), (16, 1.75), (32, 3.0)])
def test_the_plasma_is_diamond_and_square(size: int, decay: float) -> None:
    clouds = plasma(size, decay, np.random.default_rng(1))
    assert clouds.min() == 0 and clouds.max() == 1
    assert np.allclose(clouds, plain_plasma(size, decay, np.random.default_rng(1)), atol=1e-6)


def test_a_larger_decay_makes_smoother_clouds() -> None:
    steps = [
        np.mean([np.abs(np.diff(plasma(64, decay, np.random.default_rng(seed)))).mean() for seed in range(8)])
        for decay in (1.25, 1.75, 2.5)
    ]
    assert steps[0] > 1.1 * steps[1] and steps[1] > 1.1 * steps[2]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_brightens_the_dark_and_darkens_the_bright(severity: int) -> None:
    dark, bright = np.full((32, 32, 3), 40, np.uint8), np.full((32, 32, 3), 250, np.uint8)
    dark[:2, :2] = bright[:2, :2] = 255
    for key in range(5):
        assert corrupt(dark, Corruption("fog", severity), key).mean() > dark.mean() + 5
        assert corrupt(bright, Corruption("fog", severity), key).mean() < bright.mean() - 5


def test_fog_adds_the_clouds_and_keeps_the_brightest_level() -> None:
    image = photos(24)[0].astype(np.float32) / 255
    clouds = plasma(32, 2.0, np.random.default_rng(4))[:24, :24, None]
    expected = (image + 0.8 * clouds) / (image.max() + 0.8) * image.max()
    actual = fog(image, 0.8, 2.0, np.random.default_rng(4))
    assert np.allclose(actual, expected, atol=1e-6) and actual.max() <= image.max() + 1e-6
    assert fog(np.zeros((5, 9, 1), np.float32), 0.8, 2.0, np.random.default_rng(4)).max() == 0


def test_snow_only_brightens_and_covers_more_with_the_severity() -> None:
    grey = np.full((64, 64, 3), 100, np.uint8)
    copies = [corrupt(grey, Corruption("snow_like", severity), key=0).astype(int) for severity in SEVERITIES]
    assert all((copy >= 100).all() for copy in copies)
    assert (np.diff([copy.mean() for copy in copies]) > 0).all()
    assert all((copy == copy[..., :1]).all() for copy in copies)  # white


def test_flakes_leave_trails_downwards() -> None:
    black, changes = np.zeros((128, 128, 1), np.float32), []
    threshold, radius, sd, _ = SNOW_LIKE[0]
    for seed in range(20):
        fallen = snow_like(black, threshold, radius, sd, 0.0, np.random.default_rng(seed))[..., 0]
        changes.append([np.abs(np.diff(fallen, axis=axis)).mean() for axis in (0, 1)])
        # the trails spread the light of the flakes and add none
        draws = np.random.default_rng(seed).standard_normal(black.shape, np.float32)
        assert fallen.mean() == pytest.approx(np.clip(draws - threshold, 0, 1).mean(), rel=0.1)
    down, across = np.mean(changes, axis=0)
    assert across > 1.2 * down


def test_the_whitened_image_is_lighter_where_the_luma_is() -> None:
    image = np.array([[[0.2, 0.2, 0.2], [0.9, 0.0, 0.0]]], np.float32)
    whitened = snow_like(image, 99.0, 6, 1.0, 1.0, np.random.default_rng(0))  # no draw passes: no flake
    red = 1.5 * 0.299 * 0.9 + 0.5
    assert np.allclose(whitened, [[[0.8, 0.8, 0.8], [max(0.9, red), red, red]]], atol=1e-3)
    assert np.allclose(
        snow_like(image, 99.0, 6, 1.0, 0.25, np.random.default_rng(0)), 0.75 * image + 0.25 * whitened
    )
