from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from pretrain.config.schema import AugmentConfig, DataConfig, LocalCropConfig
from pretrain.data import colour
from pretrain.data.augment import apply, augment, cut, resize
from pretrain.data.draws import Box, CropDraw, draw_crops
from pretrain.seeding import numpy_stream

PHOTOS = ["china", "flower", "noise"]
LIMIT = 0.5  # grey levels, mean over pixels and channels


def error(ours: np.ndarray, reference: Image.Image | np.ndarray) -> float:
    reference = np.asarray(reference)
    assert ours.shape == reference.shape and ours.dtype == np.uint8
    return float(np.abs(ours.astype(int) - reference).mean())


def pillow_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue).astype(int) + int(shift * 255)
    return Image.merge("HSV", (Image.fromarray((turned % 256).astype(np.uint8)), saturation, value)).convert(
        "RGB"
    )


def float_blur(image: Image.Image, sigma: float) -> Image.Image:
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel /= kernel.sum()
    height, width = image.height, image.width
    pixels = np.pad(np.asarray(image, np.float64), ((4, 4), (4, 4), (0, 0)), "reflect")
    pixels = sum(weight * pixels[i : i + height] for i, weight in enumerate(kernel))
    pixels = sum(weight * pixels[:, i : i + width] for i, weight in enumerate(kernel))
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


ADJUST = {
    "brightness": (colour.adjust_brightness, lambda image, x: ImageEnhance.Brightness(image).enhance(x)),
    "contrast": (colour.adjust_contrast, lambda image, x: ImageEnhance.Contrast(image).enhance(x)),
    "saturation": (colour.adjust_saturation, lambda image, x: ImageEnhance.Color(image).enhance(x)),
    "hue": (colour.adjust_hue, pillow_hue),
    "blur": (colour.blur, float_blur),
}
AMOUNTS = {
    "brightness": (0.6, 0.87, 1.0, 1.4),
    "contrast": (0.6, 0.87, 1.0, 1.4),
    "saturation": (0.8, 0.93, 1.0, 1.2),
    "hue": (-0.1, -0.02, 0.0, 0.05, 0.1),
    "blur": (0.1, 0.4, 1.0, 2.0),
}


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize(("name", "amount"), [(name, x) for name in ADJUST for x in AMOUNTS[name]])
def test_each_operation_equals_pillow(
    images: dict[str, np.ndarray], photo: str, name: str, amount: float
) -> None:
    ours, reference = ADJUST[name]
    before = images[photo].copy()
    result = ours(images[photo], amount)
    assert error(result, reference(Image.fromarray(before), amount)) < LIMIT
    np.testing.assert_array_equal(images[photo], before)


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("size", [17, 96, 98, 224])
def test_blur_has_the_levels_of_opencvs(images: dict[str, np.ndarray], photo: str, size: int) -> None:
    crop = resize(images[photo], size)
    for sigma in np.linspace(0.1, 2, 60):
        expected = cv2.GaussianBlur(crop, (9, 9), sigma, borderType=cv2.BORDER_REFLECT_101)
        np.testing.assert_array_equal(colour.blur(crop, sigma), expected)


@pytest.mark.parametrize("photo", PHOTOS)
def test_gray_and_solarize_equal_pillow(images: dict[str, np.ndarray], photo: str) -> None:
    image = Image.fromarray(images[photo])
    assert error(colour.to_gray(images[photo]), image.convert("L").convert("RGB")) < LIMIT
    assert error(colour.solarize(images[photo]), ImageOps.solarize(image, 128)) == 0


def test_gray_pixels_are_not_darkened_by_saturation() -> None:
    gray = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    for factor in (0.8, 0.95, 1.1, 1.2):
        np.testing.assert_array_equal(colour.adjust_saturation(gray, factor), gray)


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize(
    ("box", "size"),
    [
        (Box(3, 5, 300, 400), 224),
        (Box(60, 40, 97, 110), 96),
        (Box(0, 0, 60, 70), 96),
        (Box(9, 9, 96, 96), 96),
        (Box(5, 5, 1, 3), 96),
    ],
)
def test_crop_and_resize_equal_pillow(images: dict[str, np.ndarray], photo: str, box: Box, size: int) -> None:
    part = Image.fromarray(images[photo]).crop(
        (box.left, box.top, box.left + box.width, box.top + box.height)
    )
    reference = part.resize((size, size), Image.Resampling.BICUBIC)
    ours = resize(images[photo][box.top : box.top + box.height, box.left : box.left + box.width], size)
    assert error(ours, reference) < LIMIT


def pillow_chain(image: Image.Image, draw: CropDraw, size: int) -> Image.Image:
    box = draw.box
    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    crop = part.resize((size, size), Image.Resampling.BICUBIC)
    crop = ImageOps.mirror(crop) if draw.flip else crop
    for name, amount in draw.jitter:
        crop = ADJUST[name][1](crop, amount)
    crop = crop.convert("L").convert("RGB") if draw.grayscale else crop
    crop = float_blur(crop, draw.sigma) if draw.sigma is not None else crop
    return ImageOps.solarize(crop, 128) if draw.solarize else crop


@pytest.mark.parametrize("photo", PHOTOS)
def test_the_whole_chain_equals_pillow(images: dict[str, np.ndarray], photo: str) -> None:
    image = Image.fromarray(images[photo])
    for i in range(8):
        global_draws, local_draws = draw_crops(numpy_stream(0, "test", i), 375, 500, DataConfig())
        for draw in global_draws + local_draws:
            size = 224 if draw in global_draws else 96
            assert error(apply(images[photo], draw, size), pillow_chain(image, draw, size)) < LIMIT


def test_augment_fills_its_outputs(images: dict[str, np.ndarray]) -> None:
    large, small = np.zeros((2, 3, 224, 224), np.uint8), np.zeros((8, 3, 96, 96), np.uint8)
    draws = draw_crops(numpy_stream(0, "test"), 375, 500, DataConfig())
    augment(images["china"], draws, large, small)
    for out, crops in zip((large, small), draws, strict=True):
        for planes, draw in zip(out, crops, strict=True):
            expected = apply(images["china"], draw, planes.shape[-1]).transpose(2, 0, 1)
            np.testing.assert_array_equal(planes, expected)


@pytest.mark.parametrize("function", [augment, cut])
def test_crops_are_written_into_strided_slots(images: dict[str, np.ndarray], function: Callable) -> None:
    """The loader passes slices of a group's arrays."""
    cfg = replace(DataConfig(), local_crops=LocalCropConfig(size=32, number=2))
    draws = draw_crops(numpy_stream(0, "test"), 375, 500, cfg)
    groups = np.zeros((2, 5, 3, 224, 224), np.uint8), np.zeros((2, 5, 3, 32, 32), np.uint8)
    alone = np.zeros((2, 3, 224, 224), np.uint8), np.zeros((2, 3, 32, 32), np.uint8)
    function(images["flower"], draws, groups[0][:, 3], groups[1][:, 3])
    function(images["flower"], draws, *alone)
    for group, single in zip(groups, alone, strict=True):
        np.testing.assert_array_equal(group[:, 3], single)
        assert single.any() and not group[:, [0, 1, 2, 4]].any()


def bands_of(images: dict[str, np.ndarray], channels: int) -> np.ndarray:
    stacked = np.concatenate([images[photo] for photo in PHOTOS], axis=2)
    return np.ascontiguousarray(stacked[..., :channels])


CHANNEL_CFG = DataConfig(
    augment=AugmentConfig(saturation=0, hue=0, grayscale_probability=0, contrast=0, solarize_probability=0.5)
)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8])
def test_channels_are_changed_alike(images: dict[str, np.ndarray], channels: int) -> None:
    """Without contrast, which looks across channels: each comes out as if it were alone."""
    image = bands_of(images, channels)
    for i in range(5):
        global_draws, local_draws = draw_crops(numpy_stream(0, "test", i), 375, 500, CHANNEL_CFG)
        for draw in global_draws + local_draws[:2]:
            crop = apply(image, draw, 96)
            assert crop.shape == (96, 96, channels)
            for c in range(channels):
                gray = np.ascontiguousarray(image[..., c])
                alone = apply(np.repeat(gray[..., None], 3, axis=2), draw, 96)
                np.testing.assert_array_equal(crop[..., c], alone[..., 0])


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_contrast_turns_around_the_mean_of_all_channels(images: dict[str, np.ndarray], channels: int) -> None:
    image = bands_of(images, channels)
    level = int(image.mean() + 0.5)
    for factor in (0.6, 1.0, 1.4):
        expected = np.floor(level + factor * (image.astype(float) - level) + 1e-5).clip(0, 255)
        result = colour.adjust_contrast(image, factor)
        assert result.shape == image.shape and np.abs(result - expected).mean() < 0.05


def test_contrast_of_gray_equals_pillows(images: dict[str, np.ndarray]) -> None:
    gray = np.ascontiguousarray(images["china"][..., :1])
    for factor in AMOUNTS["contrast"]:
        reference = ImageEnhance.Contrast(Image.fromarray(gray[..., 0])).enhance(factor)
        assert error(colour.adjust_contrast(gray, factor)[..., 0], reference) < LIMIT
