"""What the model is shown: the crops of a few images of a batch, side by side."""

import torch
from torch import Tensor

from pretrain.analysis.sheet import table
from pretrain.batch import Batch

HIDDEN = 0.35  # brightness of the patches that the student does not see


def crop_picture(batch: Batch, count: int, patch_size: int) -> Tensor:
    """A contact sheet, a row per image: the global crops, as the student sees them, and the local crops.

    Args:
        batch: with uint8 crops.
        count: images shown, the first ones.
        patch_size: pixels.

    Returns:
        (3, height, width) uint8.
    """
    images = batch.num_images
    grid = batch.global_crops.shape[-1] // patch_size
    seen = ~batch.masks.view(-1, 1, grid, grid)
    light = seen.float().repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    masked = _colours(batch.global_crops) * (HIDDEN + (1 - HIDDEN) * light)
    kinds = {"global": _colours(batch.global_crops), "masked": masked, "local": _colours(batch.local_crops)}
    columns, titles = [], []
    for kind, crops in kinds.items():
        for i in range(len(crops) // images):
            columns.append(crops[i * images : i * images + count])
            titles.append(f"{kind} {i + 1}")
    return table(columns, titles)


def _colours(crops: Tensor) -> Tensor:
    """(n, C, S, S) uint8 as (n, 3, S, S) from 0 to 1: one channel as grey, of more than three the first."""
    shown = crops[:, :1].expand(-1, 3, -1, -1) if crops.shape[1] < 3 else crops[:, :3]
    return shown.to(torch.float32) / 255
