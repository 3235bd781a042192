"""An image and the draws of its crops, decoded no larger than they need where `data.decode.scale` is fast."""

from dataclasses import replace

import numpy as np

from pretrain.config.schema import DataConfig
from pretrain.data.decode import decode, jpeg_size
from pretrain.data.draws import Box, CropDraw, Draws, draw_crops
from pretrain.data.pixels import Pixels

REDUCTIONS = (8, 4, 2)  # of a JPEG, in its own transform


def decode_and_draw(content: bytes, cfg: DataConfig, rng: np.random.Generator) -> tuple[Pixels, Draws]:
    """The (H, W, C) pixels of an image file and the draws of its crops, with boxes in these pixels.

    The draws depend on the full size of the image and on `rng` alone, however it is decoded.

    Raises:
        ValueError: the bytes cannot be decoded; says why.
    """
    size = jpeg_size(content, cfg.decode) if cfg.decode.scale == "fast" else None
    if size is None:
        image = decode(content, cfg.decode, cfg.channels)
        return image, draw_crops(rng, image.shape[0], image.shape[1], cfg)
    draws = draw_crops(rng, *size, cfg)
    reduction = largest_reduction(draws, cfg)
    image = decode(content, cfg.decode, cfg.channels, reduction)
    if image.shape[:2] == size:  # also where the JPEG has an oddity that only Pillow reads
        return image, draws
    height, width = image.shape[:2]
    large, small = ([_reduce(draw, reduction, height, width) for draw in kind] for kind in draws)
    return image, (large, small)


def largest_reduction(draws: Draws, cfg: DataConfig) -> int:
    """The largest one at which no box is smaller than its crop; 1 where each makes some box too small."""
    sizes = (cfg.global_crops.size, cfg.local_crops.size)
    ratios = [
        min(draw.box.height, draw.box.width) / size
        for kind, size in zip(draws, sizes, strict=True)
        for draw in kind
    ]
    return next((reduction for reduction in REDUCTIONS if min(ratios) >= reduction), 1)


def _reduce(draw: CropDraw, reduction: int, height: int, width: int) -> CropDraw:
    """A draw for an image made smaller to height x width pixels."""
    box = draw.box
    h, w = round(box.height / reduction), round(box.width / reduction)
    top, left = min(round(box.top / reduction), height - h), min(round(box.left / reduction), width - w)
    return replace(draw, box=Box(top, left, h, w))
