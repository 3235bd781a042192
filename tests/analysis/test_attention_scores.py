"""Consistency and alignment of maps, against loops over pixels and maps whose answer is known."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pretrain.analysis.alignment import Cover, cover, energy_inside, mass, overlap, pointing
from pretrain.analysis.consistency import consistency, pearson
from pretrain.analysis.segmentation import IGNORED

PATCH, SIDE = 4, 8


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 3, PATCH * SIDE, PATCH * SIDE, generator=torch.Generator().manual_seed(seed))


def content(pixels: Tensor) -> Tensor:
    """Two maps that follow what a patch shows."""
    return avg_pool2d(pixels[:, :2], PATCH)


def place(pixels: Tensor) -> Tensor:
    """A map that grows to the right, whatever the image."""
    side = pixels.shape[-1] // PATCH
    return torch.arange(float(side)).expand(len(pixels), 1, side, side)


def test_maps_that_follow_the_content_are_consistent() -> None:
    found = consistency(content, images())
    for move in ("flip", "rotation", "crop"):
        torch.testing.assert_close(found[move], torch.ones(3))
    assert found["other image"].abs().max() < 0.5


def test_maps_that_follow_the_place_are_not() -> None:
    found = consistency(place, images())
    expected = {"flip": -1.0, "rotation": -1 / 3, "crop": 1.0, "other image": 1.0}  # rotated: 0, -1, 0
    assert {move: float(values.mean()) for move, values in found.items()} == pytest.approx(expected)


def test_what_is_too_small_to_crop_is_not_cropped() -> None:
    found = consistency(content, images()[..., : 2 * PATCH, : 2 * PATCH])
    assert set(found) == {"flip", "rotation", "other image"}


def test_correlation_is_that_of_numpy() -> None:
    one, two = content(images(1)), content(images(2))
    expected = [
        np.mean(
            [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(x.numpy(), y.numpy(), strict=True)]
        )
        for x, y in zip(one, two, strict=True)
    ]
    np.testing.assert_allclose(pearson(one, two), expected, rtol=1e-5)
    assert pearson(torch.ones(1, 1, 3, 3), torch.rand(1, 1, 3, 3)) == 0


@pytest.fixture(scope="module")
def masked() -> tuple[Tensor, Tensor, Cover]:
    """Maps (3, 8, 8), masks (3, 32, 32) of a rectangle that cuts patches, and their cover."""
    maps = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    masks = torch.zeros(3, PATCH * SIDE, PATCH * SIDE, dtype=torch.int64)
    masks[0, 3:18, 6:21], masks[1, 10:30, 1:9], masks[2, 5:9, 5:30] = 1, 2, 7
    masks[:, 12:15, :17] = IGNORED
    return maps, masks, cover(masks, SIDE, SIDE)


def large(maps: Tensor) -> Tensor:
    return maps.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)


def test_scores_equal_loops_over_pixels(masked) -> None:
    maps, masks, covered = masked
    places = maps > 0.6
    for i in range(3):
        energy = total = both = either = inside = counted = 0.0
        for value, marked, pixel in zip(
            large(maps)[i].flatten(), large(places)[i].flatten(), masks[i].flatten(), strict=True
        ):
            if pixel == IGNORED:
                continue
            counted += 1
            total += float(value)
            inside += int(pixel != 0)
            energy += float(value) * int(pixel != 0)
            both += int(marked and pixel != 0)
            either += int(marked or pixel != 0)
        assert float(energy_inside(maps, covered)[i]) == pytest.approx(energy / total)
        assert float(overlap(places, covered)[i]) == pytest.approx(both / either)
        assert float(covered.area()[i]) == pytest.approx(inside / counted)


def test_pointing_looks_at_the_highest_patch_that_counts() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.int64)
    masks[0, :4, :2], masks[0, :4, 4:5], masks[0, 4:, 4:] = 1, 1, IGNORED  # half, a quarter, nothing counts
    covered = cover(masks, 2, 2)
    for values, hit in (([3, 1, 2, 0], 1), ([1, 3, 2, 0], 0), ([1, 2, 3, 0], 0), ([3, 1, 2, 9], 1)):
        assert pointing(torch.tensor(values).float().view(1, 2, 2), covered).tolist() == [hit]


def test_the_brightest_patches_hold_the_mass(masked) -> None:
    maps, _, _ = masked
    kept = mass(maps, 0.6)
    for values, marks in zip(maps, kept, strict=True):
        assert values[marks].min() >= values[~marks].max()
        assert values[marks].sum() >= 0.6 * values.sum()
        assert values[marks].sum() - values[marks].min() < 0.6 * values.sum()  # none too many


def test_a_perfect_map_scores_fully_and_an_even_one_the_area() -> None:
    masks = torch.zeros(2, PATCH * SIDE, PATCH * SIDE, dtype=torch.int64)
    masks[:, 8:16, 4:20] = 1
    covered = cover(masks, SIDE, SIDE)
    perfect, even = covered.inside / PATCH**2, torch.ones(2, SIDE, SIDE)
    for score in (energy_inside(perfect, covered), pointing(perfect, covered), overlap(perfect > 0, covered)):
        assert score.tolist() == [1, 1]
    torch.testing.assert_close(energy_inside(even, covered), covered.area())
    torch.testing.assert_close(overlap(even > 0, covered), covered.area())
