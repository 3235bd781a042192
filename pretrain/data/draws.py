"""What happens to one crop, drawn as numbers before any pixel is touched."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np

from pretrain.config.schema import AugmentConfig, CropConfig, DataConfig

CropKind = Literal["global_1", "global_2", "local"]
Adjustment = Literal["brightness", "contrast", "saturation", "hue"]

ADJUSTMENTS: tuple[Adjustment, ...] = ("brightness", "contrast", "saturation", "hue")
ADJUSTMENT_ORDERS = tuple(permutations(range(4)))
BLUR_PROBABILITY: dict[str, dict[CropKind, float]] = {
    "released": {"global_1": 0.0, "global_2": 0.9, "local": 0.5},
    "paper": {"global_1": 1.0, "global_2": 0.1, "local": 0.5},
    "none": {"global_1": 0.0, "global_2": 0.0, "local": 0.0},
}
SIGMA = (0.1, 2.0)  # of the blur, in pixels
LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))  # width / height of a box
BOX_TRIES = 10
UNIFORMS = 4 * BOX_TRIES + 11  # numbers in [0, 1) that one crop uses, whatever happens to it


@dataclass(frozen=True)
class Box:
    """The part of an image that becomes a crop, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class CropDraw:
    """Everything random about one crop."""

    box: Box
    flip: bool
    jitter: tuple[
        tuple[Adjustment, float], ...
    ]  # in the order of use: factors, and for hue a share of the circle
    grayscale: bool
    sigma: float | None  # of the blur, in pixels; None = no blur
    solarize: bool


Draws = tuple[list[CropDraw], list[CropDraw]]  # of the global and of the local crops of an image


def draw_crops(rng: np.random.Generator, height: int, width: int, cfg: DataConfig) -> Draws:
    """The two global and the local crops of one image of height x width pixels."""
    uniforms = rng.random((2 + cfg.local_crops.number, UNIFORMS)).tolist()
    kinds: list[CropKind] = ["global_1", "global_2", *["local"] * cfg.local_crops.number]  # type: ignore[list-item]
    draws = [
        _draw(
            iter(row),
            kind,
            height,
            width,
            cfg.local_crops if kind == "local" else cfg.global_crops,
            cfg.augment,
        )
        for row, kind in zip(uniforms, kinds, strict=True)
    ]
    return draws[:2], draws[2:]


def _draw(
    uniform: Iterator[float],
    kind: CropKind,
    height: int,
    width: int,
    crop: CropConfig,
    augment: AugmentConfig,
) -> CropDraw:
    """One crop. Each number has its own place: changing one probability leaves the other draws alone."""
    boxes = [next(uniform) for _ in range(4 * BOX_TRIES)]
    flip = next(uniform) < augment.flip_probability
    jitter = _draw_jitter(uniform, augment)
    grayscale = next(uniform) < augment.grayscale_probability
    blurred = next(uniform) < BLUR_PROBABILITY[augment.blur][kind]
    sigma = _between(SIGMA, next(uniform))
    solarize = next(uniform) < augment.solarize_probability and kind == "global_2"
    box = draw_box(iter(boxes), height, width, (crop.scale[0], crop.scale[1]))
    return CropDraw(box, flip, jitter, grayscale, sigma if blurred else None, solarize)


def draw_box(uniform: Iterator[float], height: int, width: int, scale: tuple[float, float]) -> Box:
    """A box with a share of the image's area between the scales, uniform, and a log-uniform aspect.

    After ten boxes that do not fit: the centre, as much of it as the aspect allows.
    """
    for _ in range(BOX_TRIES):
        area = height * width * _between(scale, next(uniform))
        aspect = math.exp(_between(LOG_ASPECT, next(uniform)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = next(uniform), next(uniform)
        if 0 < w <= width and 0 < h <= height:
            return Box(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    return _centre_box(height, width)


def _centre_box(height: int, width: int) -> Box:
    low, high = math.exp(LOG_ASPECT[0]), math.exp(LOG_ASPECT[1])
    h, w = min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _draw_jitter(uniform: Iterator[float], augment: AugmentConfig) -> tuple[tuple[Adjustment, float], ...]:
    """The colour changes with their amounts; one whose strength is 0 is left out, as it changes nothing."""
    applied, order = next(uniform) < augment.jitter_probability, int(next(uniform) * len(ADJUSTMENT_ORDERS))
    strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    amounts = [
        _between((-s, s) if name == "hue" else (max(0.0, 1 - s), 1 + s), next(uniform))
        for name, s in zip(ADJUSTMENTS, strengths, strict=True)
    ]
    if not applied:
        return ()
    return tuple((ADJUSTMENTS[i], amounts[i]) for i in ADJUSTMENT_ORDERS[order] if strengths[i] > 0)


def _between(bounds: tuple[float, float], uniform: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform
