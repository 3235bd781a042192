"""Learned absolute position embeddings and their interpolation to other image sizes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def interpolate_pos_embed(
    pos_embed: Tensor, stored: tuple[int, int], grid: tuple[int, int], offset: float, antialias: bool
) -> Tensor:
    """Position embeddings for another patch grid, as DINOv2 computes them.

    Args:
        pos_embed: (1, 1 + M*M', D), the class token's own embedding first.
        stored: rows and columns M, M' of the embeddings.
        grid: patch rows and columns of the images.
        offset: when not 0, the kernel uses the scale factors (rows + offset) / M instead of those of the two
            sizes: the values differ, and released models depend on it (0.1, or 0.0 for the register models).
        antialias: low-pass before shrinking (released register models).

    Returns:
        (1, 1 + rows*cols, D) in the dtype of `pos_embed`.
    """
    cls_pos, patch_pos = pos_embed[:, :1], pos_embed[:, 1:].float()
    patch_pos = patch_pos.unflatten(1, stored).permute(0, 3, 1, 2)  # (1, D, M, M')
    size: dict[str, Any] = {"size": grid}
    if offset:
        size = {"scale_factor": tuple((n + offset) / m for n, m in zip(grid, stored, strict=True))}
    patch_pos = interpolate(patch_pos, mode="bicubic", antialias=antialias, **size)
    return torch.cat([cls_pos, patch_pos.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
