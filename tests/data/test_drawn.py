from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pretrain.config.schema import CropConfig, DataConfig, DecodeConfig, LocalCropConfig
from pretrain.data.augment import apply
from pretrain.data.decode import decode
from pretrain.data.drawn import decode_and_draw, largest_reduction
from pretrain.data.draws import CropDraw, Draws, draw_crops
from pretrain.seeding import numpy_stream
from tests.data.pictures import encode

EXACT = DataConfig(
    global_crops=CropConfig(size=64, scale=[0.5, 1.0]),
    local_crops=LocalCropConfig(size=32, number=4, scale=[0.2, 0.5]),
)
FAST = replace(EXACT, decode=DecodeConfig(scale="fast"))


@pytest.fixture(scope="module")
def large(images: dict[str, np.ndarray]) -> np.ndarray:
    """(1125, 1499, 3)."""
    return np.asarray(Image.fromarray(images["china"]).resize((1499, 1125), Image.Resampling.BICUBIC))


def crops_of(draws: Draws) -> list[CropDraw]:
    return [*draws[0], *draws[1]]


@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_draws_the_same_crops_of_a_smaller_image(large: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Whole blocks where the image is turned: else a mirrored axis starts within a block, part of a pixel off.
    picture = large if orientation == 1 else np.ascontiguousarray(large[:1120, :1496])
    content = encode(picture, "JPEG", quality=90, exif=exif)
    reductions = set()
    for i in range(6):
        exact, full = decode_and_draw(content, EXACT, numpy_stream(0, "test", i))
        small, reduced = decode_and_draw(content, FAST, numpy_stream(0, "test", i))
        assert full == draw_crops(numpy_stream(0, "test", i), *exact.shape[:2], EXACT)
        reduction = largest_reduction(full, EXACT)
        assert small.shape == (*(-(-side // reduction) for side in exact.shape[:2]), 3)
        sizes = [64, 64, 32, 32, 32, 32]
        for size, draw, other in zip(sizes, crops_of(full), crops_of(reduced), strict=True):
            box, mine = draw.box, other.box
            assert replace(other, box=box) == draw
            for name in ("top", "left", "height", "width"):
                assert abs(getattr(mine, name) - getattr(box, name) / reduction) <= 1
            assert mine.top + mine.height <= small.shape[0] and mine.left + mine.width <= small.shape[1]
            plain = replace(draw, jitter=(), solarize=False)
            difference = apply(exact, plain, size).astype(int) - apply(small, replace(plain, box=mine), size)
            assert np.abs(difference).mean() < 8  # the boxes are whole pixels of another grid
        reductions.add(reduction)
    assert reductions <= {2, 4, 8} and reductions


def test_the_reduction_keeps_every_box_as_large_as_its_crop() -> None:
    seen = set()
    for i in range(300):
        cfg = replace(EXACT, local_crops=replace(EXACT.local_crops, size=16 + i))
        draws = draw_crops(numpy_stream(0, "test", i), 700, 900, cfg)
        reduction = largest_reduction(draws, cfg)
        sizes = [64, 64, *[cfg.local_crops.size] * 4]
        ratios = [
            min(c.box.height, c.box.width) / size for c, size in zip(crops_of(draws), sizes, strict=True)
        ]
        assert reduction == 1 or min(ratios) >= reduction
        assert reduction == 8 or min(ratios) < 2 * reduction
        seen.add(reduction)
    assert seen >= {1, 2, 4}


def test_fast_changes_nothing_where_crops_need_the_pixels(images: dict[str, np.ndarray]) -> None:
    cfg = DataConfig(decode=DecodeConfig(scale="fast"))
    for kind in ("JPEG", "PNG"):
        content = encode(images["china"], kind)
        image, draws = decode_and_draw(content, cfg, numpy_stream(0, "test"))
        np.testing.assert_array_equal(image, decode(content))
        assert draws == draw_crops(numpy_stream(0, "test"), 375, 500, cfg)


def test_fast_leaves_to_pillow_what_it_alone_reads(large: np.ndarray) -> None:
    content = encode(Image.fromarray(large).convert("CMYK"), "JPEG")
    odd = encode(large, "JPEG")
    start = odd.index(b"\xff\xdb")
    for each in (content, odd[:start] + b"\0\0\0" + odd[start:]):
        image, draws = decode_and_draw(each, FAST, numpy_stream(0, "test"))
        np.testing.assert_array_equal(image, decode(each))
        assert draws == draw_crops(numpy_stream(0, "test"), 1125, 1499, FAST)


def test_errors_are_those_of_decode(large: np.ndarray) -> None:
    content = encode(large, "JPEG")
    for cfg in (EXACT, FAST):
        for damaged in (b"", b"hello", content[: len(content) // 2]):
            with pytest.raises(ValueError, match=r"."):
                decode_and_draw(damaged, cfg, numpy_stream(0, "test"))
        tight = replace(cfg, decode=replace(cfg.decode, max_pixels=1000))
        with pytest.raises(ValueError, match=r"1499 x 1125 pixels are more than"):
            decode_and_draw(content, tight, numpy_stream(0, "test"))
