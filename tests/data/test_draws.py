import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pretrain.config.schema import AugmentConfig, DataConfig
from pretrain.data.draws import CropDraw, draw_crops
from pretrain.seeding import numpy_stream

COUNT = 1500
HEIGHT, WIDTH = 375, 500
Draws = list[tuple[list[CropDraw], list[CropDraw]]]


def draw_many(cfg: DataConfig, height: int = HEIGHT, width: int = WIDTH, count: int = COUNT) -> Draws:
    return [draw_crops(numpy_stream(0, "augment", 0, i), height, width, cfg) for i in range(count)]


@pytest.fixture(scope="module")
def draws() -> Draws:
    return draw_many(DataConfig())


def share(crops: list[CropDraw], predicate) -> float:
    return sum(map(predicate, crops)) / len(crops)


def near(expected: float, count: int) -> object:
    return pytest.approx(expected, abs=4 * math.sqrt(max(expected * (1 - expected), 1e-12) / count))


@pytest.mark.parametrize(
    ("blur", "probabilities"),
    [("released", (0.0, 0.9, 0.5)), ("paper", (1.0, 0.1, 0.5)), ("none", (0.0, 0.0, 0.0))],
)
def test_share_of_blurred_crops(blur: str, probabilities: tuple[float, ...]) -> None:
    draws = draw_many(DataConfig(augment=AugmentConfig(blur=blur)), count=800)
    kinds = (
        [g[0] for g, _ in draws],
        [g[1] for g, _ in draws],
        [crop for _, crops in draws for crop in crops],
    )
    for crops, expected in zip(kinds, probabilities, strict=True):
        assert share(crops, lambda crop: crop.sigma is not None) == near(expected, len(crops))
        assert all(0.1 <= crop.sigma <= 2 for crop in crops if crop.sigma is not None)


def test_shares_of_the_other_changes(draws: Draws) -> None:
    crops = [crop for large, small in draws for crop in large + small]
    assert share(crops, lambda crop: crop.flip) == near(0.5, len(crops))
    assert share(crops, lambda crop: bool(crop.jitter)) == near(0.8, len(crops))
    assert share(crops, lambda crop: crop.grayscale) == near(0.2, len(crops))
    assert share([g[1] for g, _ in draws], lambda crop: crop.solarize) == near(0.2, len(draws))
    assert not any(crop.solarize for large, small in draws for crop in [large[0], *small])


def test_amounts_of_jitter(draws: Draws) -> None:
    jitters = [crop.jitter for large, small in draws for crop in large + small if crop.jitter]
    bounds = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in bounds.items():
        amounts = np.array([dict(jitter)[name] for jitter in jitters])
        assert amounts.min() >= low and amounts.max() <= high
        assert amounts.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert amounts.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.03)
    orders = Counter(tuple(name for name, _ in jitter) for jitter in jitters)
    assert len(orders) == 24
    assert all(count / len(jitters) == near(1 / 24, len(jitters)) for count in orders.values())


def test_boxes_follow_scale_and_aspect(draws: Draws) -> None:
    kinds = (
        ([c for g, _ in draws for c in g], 0.32, 1.0),
        ([c for _, small in draws for c in small], 0.05, 0.32),
    )
    for crops, low, high in kinds:
        boxes = [crop.box for crop in crops]
        assert all(b.top >= 0 and b.left >= 0 for b in boxes)
        assert all(b.top + b.height <= HEIGHT and b.left + b.width <= WIDTH for b in boxes)
        areas = np.array([b.height * b.width / (HEIGHT * WIDTH) for b in boxes])
        assert areas.min() > low * 0.98 and areas.max() < high * 1.02
        assert all(0.73 < b.width / b.height < 1.37 for b in boxes)
    areas, aspects = np.array([[b.height * b.width, math.log(b.width / b.height)] for b in boxes]).T
    share_of_image = areas.mean() / (HEIGHT * WIDTH)
    assert share_of_image == pytest.approx((0.05 + 0.32) / 2, rel=0.02)  # small boxes always fit
    assert aspects.mean() == pytest.approx(0, abs=0.01)
    assert aspects.std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.03)


@pytest.mark.parametrize(
    ("height", "width", "box"), [(20, 400, (20, 27)), (400, 20, (27, 20)), (100, 100, None)]
)
def test_impossible_boxes_become_the_centre(height: int, width: int, box: tuple[int, int] | None) -> None:
    cfg = DataConfig()
    cfg = replace(cfg, global_crops=replace(cfg.global_crops, scale=[1.0, 1.0]))
    for (first, _), _ in draw_many(cfg, height, width, 20):
        if box:
            assert (first.box.height, first.box.width) == box
            assert first.box.top == (height - box[0]) // 2 and first.box.left == (width - box[1]) // 2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (3, 2)])
def test_tiny_images_have_boxes(height: int, width: int) -> None:
    for large, small in draw_many(DataConfig(), height, width, 50):
        for crop in large + small:
            assert 1 <= crop.box.height <= height - crop.box.top
            assert 1 <= crop.box.width <= width - crop.box.left


def test_equal_streams_draw_equally_and_others_do_not() -> None:
    cfg = DataConfig()
    first = draw_crops(numpy_stream(0, "augment", 0, 7), HEIGHT, WIDTH, cfg)
    assert first == draw_crops(numpy_stream(0, "augment", 0, 7), HEIGHT, WIDTH, cfg)
    assert first != draw_crops(numpy_stream(0, "augment", 1, 7), HEIGHT, WIDTH, cfg)


def test_strength_zero_leaves_an_adjustment_out() -> None:
    cfg = DataConfig(augment=AugmentConfig(hue=0.0, contrast=0.0, jitter_probability=1.0))
    for g, _ in draw_many(cfg, count=20):
        assert {name for name, _ in g[0].jitter} == {"brightness", "saturation"}


def test_one_probability_does_not_move_the_other_draws() -> None:
    plain = draw_many(DataConfig(), count=20)
    other = draw_many(DataConfig(augment=AugmentConfig(jitter_probability=0.0, blur="none")), count=20)
    for (a, _), (b, _) in zip(plain, other, strict=True):
        assert [replace(x, jitter=(), sigma=None) for x in a] == b
