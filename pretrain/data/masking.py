"""Block masking of the student's global crops, shared out over a group of images, as in DINOv2."""

import math
from typing import Any

import numpy as np

from pretrain.config.schema import MaskConfig

Mask = np.ndarray[Any, np.dtype[np.bool_]]

BLOCK_TRIES = 10
MAX_BLOCK = 0.5  # share of the grid that one block may cover


def group_masks(cfg: MaskConfig, grid: int, num_crops: int, rng: np.random.Generator) -> Mask:
    """Masks for all global crops of a group.

    A share `cfg.probability` of the crops is masked. Their target shares are stratified: one from each of as
    many equal parts of `cfg.ratio`, so that a group always has about the same number of masked patches.

    Args:
        cfg: shares, smallest block and aspect.
        grid: patches along one side of a crop.
        num_crops: global crops in the group, two per image.
        rng: all randomness comes from here.

    Returns:
        (num_crops, grid * grid) bool, True where the student sees a mask token; masked crops stand anywhere.
    """
    masks = np.zeros((num_crops, grid * grid), bool)
    num_masked = int(num_crops * cfg.probability)
    edges = np.linspace(cfg.ratio[0], cfg.ratio[1], num_masked + 1)
    for i in range(num_masked):
        target = int(grid * grid * rng.uniform(edges[i], edges[i + 1]))
        masks[i] = block_mask(cfg, grid, target, rng).ravel()
    return masks[rng.permutation(num_crops)]


def block_mask(cfg: MaskConfig, grid: int, target: int, rng: np.random.Generator) -> Mask:
    """(grid, grid) bool with `target` patches masked by rectangles, or a few less where no more fit."""
    mask = np.zeros((grid, grid), bool)
    remaining = target
    while remaining > 0:
        added = _add_block(mask, cfg, min(remaining, MAX_BLOCK * grid * grid), rng)
        if not added:
            break
        remaining -= added
    return mask


def _add_block(mask: Mask, cfg: MaskConfig, limit: float, rng: np.random.Generator) -> int:
    """Mask a rectangle that adds 1 to `limit` patches; how many it added, 0 where every try failed."""
    for _ in range(BLOCK_TRIES):
        top, left, height, width = _draw_block(len(mask), cfg, limit, rng)
        if height >= len(mask) or width >= len(mask):
            continue
        block = mask[top : top + height, left : left + width]
        added = block.size - int(np.count_nonzero(block))
        if 0 < added <= limit:
            block[:] = True
            return added
    return 0


def _draw_block(
    grid: int, cfg: MaskConfig, limit: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in patches; a block as large as the grid is for the caller to refuse."""
    area_draw, aspect_draw, top_draw, left_draw = rng.random(4).tolist()
    area = cfg.min_patches + (limit - cfg.min_patches) * area_draw  # less than min_patches where the limit is
    aspect = math.exp(math.log(cfg.min_aspect) * (1 - 2 * aspect_draw))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    top, left = int(top_draw * max(grid - height + 1, 1)), int(left_draw * max(grid - width + 1, 1))
    return top, left, height, width
