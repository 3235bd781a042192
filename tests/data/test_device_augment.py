"""The device half of the augmentation against the CPU path."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.config.schema import AugmentConfig, DataConfig
from pretrain.data.augment import apply, augment, cut, resize
from pretrain.data.colour import blur_taps
from pretrain.data.device_augment import augment_on_device
from pretrain.data.draw_params import NONE, TAPS, WIDTH, encode_draws
from pretrain.data.draws import Box, CropDraw, draw_crops
from pretrain.seeding import numpy_stream

PHOTOS = ["china", "flower", "noise"]
LIMIT = 0.3  # grey levels, mean over pixels and channels
SIZE = 64
PLAIN = CropDraw(Box(0, 0, SIZE, SIZE), False, (), False, None, False)
COLOURLESS = AugmentConfig(saturation=0, hue=0, grayscale_probability=0)


@pytest.fixture(scope="module")
def crops(images: dict[str, np.ndarray]) -> np.ndarray:
    """(3, SIZE, SIZE, 3): smooth, detailed and noisy."""
    return np.stack([resize(images[photo], SIZE) for photo in PHOTOS])


def on_device(crops: np.ndarray, draws: list[CropDraw], **options: int) -> np.ndarray:
    """(n, S, S, C) changed by one draw each."""
    planes = torch.from_numpy(crops.transpose(0, 3, 1, 2).copy())
    before = planes.clone()
    out = augment_on_device(planes, encode_draws(draws), **options)
    assert out.dtype == torch.uint8 and torch.equal(planes, before)
    return out.permute(0, 2, 3, 1).numpy()


def on_cpu(crops: np.ndarray, draws: list[CropDraw]) -> np.ndarray:
    whole = Box(0, 0, SIZE, SIZE)
    pairs = zip(crops, draws, strict=True)
    return np.stack([apply(crop, replace(draw, box=whole), SIZE) for crop, draw in pairs])


def differences(crops: np.ndarray, draws: list[CropDraw]) -> np.ndarray:
    return np.abs(on_device(crops, draws).astype(int) - on_cpu(crops, draws))


EXACT = {
    "flip": [replace(PLAIN, flip=True)],
    "brightness": [replace(PLAIN, jitter=(("brightness", x),)) for x in np.linspace(0.3, 1.8, 40)],
    "contrast": [replace(PLAIN, jitter=(("contrast", x),)) for x in np.linspace(0.3, 1.8, 40)],
    "grayscale": [replace(PLAIN, grayscale=True)],
    "blur": [replace(PLAIN, sigma=x) for x in np.linspace(0.1, 2, 60)],
    "solarize": [replace(PLAIN, solarize=True)],
}
NEAR = {
    "saturation": [replace(PLAIN, jitter=(("saturation", x),)) for x in np.linspace(0.3, 1.8, 40)],
    "hue": [replace(PLAIN, jitter=(("hue", x),)) for x in np.linspace(-0.5, 0.5, 101)],
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_operations_equal_the_cpus(crops: np.ndarray, name: str, channels: int) -> None:
    if name == "grayscale" and channels != 3:
        channels = 3  # the only number with colours
    stored = np.concatenate([crops, crops[..., ::-1]], axis=3)[..., :channels]
    for crop in np.ascontiguousarray(stored):
        draws = EXACT[name]
        many = np.repeat(crop[None], len(draws), axis=0)
        expected = on_cpu(many, draws)
        assert (expected != many).any()
        np.testing.assert_array_equal(on_device(many, draws), expected)


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("photo", range(3))
def test_colours_are_near_the_cpus(crops: np.ndarray, name: str, photo: int) -> None:
    draws = NEAR[name]
    apart = differences(np.broadcast_to(crops[photo], (len(draws), SIZE, SIZE, 3)), draws)
    assert apart.mean(axis=(1, 2, 3)).max() < 0.02
    assert (apart > 1).mean() < 1e-3


def test_every_colour_is_turned_like_on_the_cpu() -> None:
    """Steps of 5 levels through the whole cube, with grey, black and white."""
    axis = np.arange(0, 256, 5, dtype=np.uint8)
    cube = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(1, -1, 1, 3)[:, : 364 * 364]
    square = np.resize(cube, (1, 364, 364, 3))
    planes = torch.from_numpy(square.transpose(0, 3, 1, 2).copy())
    for shift in (-0.1, 0.0, 0.03, 0.5):
        draw = replace(PLAIN, jitter=(("hue", shift),), box=Box(0, 0, 364, 364))
        ours = augment_on_device(planes, encode_draws([draw])).permute(0, 2, 3, 1)[0].numpy()
        apart = np.abs(ours.astype(int) - apply(square[0], draw, 364))
        assert apart.mean() < 0.02 and (apart > 1).mean() < 2e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_the_chain_is_near_the_cpus(images: dict[str, np.ndarray], channels: int) -> None:
    """270 crops at the sizes of training, as the worker writes them."""
    cfg = DataConfig() if channels == 3 else DataConfig(augment=COLOURLESS)
    apart = []
    for i in range(27):
        image = np.ascontiguousarray(images[PHOTOS[i % 3]][..., :channels])
        draws = draw_crops(numpy_stream(0, "test", i), 375, 500, cfg)
        shapes = ((2, channels, 224, 224), (8, channels, 96, 96))
        resized, expected = ([np.zeros(shape, np.uint8) for shape in shapes] for _ in range(2))
        params = cut(image, draws, *resized)
        augment(image, draws, *expected)
        for crops, rows, reference in zip(resized, params, expected, strict=True):
            ours = augment_on_device(torch.from_numpy(crops), rows).numpy()
            apart += list(np.abs(ours.astype(int) - reference).mean(axis=(1, 2, 3)))
    assert len(apart) == 270 and max(apart) < LIMIT


def random_draws(count: int) -> list[CropDraw]:
    cfg = DataConfig(augment=AugmentConfig(blur="paper", solarize_probability=0.5))
    draws = [draw_crops(numpy_stream(1, "test", i), 375, 500, cfg) for i in range(count)]
    return [draw for pair in draws for kind in pair for draw in kind][:count]


def test_neighbours_and_chunks_change_nothing(crops: np.ndarray) -> None:
    draws = random_draws(24)
    many = np.tile(crops, (8, 1, 1, 1))
    together = on_device(many, draws)
    for chunk_bytes in (1, 3 * 4 * crops[0].size, 2**30):
        np.testing.assert_array_equal(on_device(many, draws, chunk_bytes=chunk_bytes), together)
    order = np.random.default_rng(0).permutation(24)
    np.testing.assert_array_equal(on_device(many[order], [draws[i] for i in order]), together[order])
    for i in range(0, 24, 5):
        np.testing.assert_array_equal(on_device(many[i : i + 1], draws[i : i + 1])[0], together[i])


def test_contrast_of_large_crops_is_exact() -> None:
    """Their sum of levels is beyond what float32 holds exactly."""
    crop = np.random.default_rng(0).integers(200, 256, (600, 600, 3), dtype=np.uint8)
    draw = replace(PLAIN, box=Box(0, 0, 600, 600), jitter=(("contrast", 0.5),))
    planes = torch.from_numpy(crop.transpose(2, 0, 1)[None].copy())
    ours = augment_on_device(planes, encode_draws([draw]))[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, apply(crop, draw, 600))


def test_nothing_drawn_leaves_the_crops(crops: np.ndarray) -> None:
    np.testing.assert_array_equal(on_device(crops, [PLAIN] * 3), crops)


def test_params_may_be_a_tensor(crops: np.ndarray) -> None:
    draws = random_draws(3)
    planes = torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 3, 1, 2)))
    rows = encode_draws(draws)
    assert torch.equal(augment_on_device(planes, rows), augment_on_device(planes, torch.from_numpy(rows)))


def test_a_row_holds_all_but_the_box() -> None:
    draws = random_draws(50)
    rows = encode_draws(draws)
    assert rows.shape == (50, WIDTH) and rows.dtype == np.float32
    np.testing.assert_array_equal(rows, encode_draws([replace(draw, box=Box(1, 2, 3, 4)) for draw in draws]))
    (plain,) = encode_draws([PLAIN])
    assert sorted(set(plain.tolist())) == [NONE, 0]
    assert not (rows[:, TAPS].any(1) ^ [draw.sigma is not None for draw in draws]).any()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 5.0])
def test_blur_weights_sum_to_one(sigma: float) -> None:
    *sides, centre = blur_taps(sigma)
    assert centre + 2 * sum(sides) == 256 and sides == sorted(sides) and min(sides) >= 0
