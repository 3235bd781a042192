"""Learned absolute position embeddings and their interpolation to other image sizes."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def interpolate_pos_embed(
    pos_embed: Tensor, grid: tuple[int, int], offset: float, antialias: bool, same_size: bool
) -> Tensor:
    """Position embeddings for a patch grid, as DINOv2 computes them.

    Args:
        pos_embed: (1, 1 + M*M, D), the class token's own embedding first.
        grid: patch rows and columns of the images.
        offset: when not 0, the kernel uses the scale factors (rows + offset) / M instead of those of the two
            sizes: the values differ, and released models depend on it (0.1, or 0.0 for the register models).
        antialias: low-pass before shrinking (released register models).
        same_size: whether the images are square; the stored grid is used as it is only then.

    Returns:
        (1, 1 + rows*cols, D) in the dtype of `pos_embed`.
    """
    stored = pos_embed.shape[1] - 1
    if same_size and grid[0] * grid[1] == stored:
        return pos_embed
    side = int(stored**0.5)
    cls_pos, patch_pos = pos_embed[:, :1], pos_embed[:, 1:].float()
    patch_pos = patch_pos.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, M, M)
    size = {"scale_factor": tuple((n + offset) / side for n in grid)} if offset else {"size": grid}
    patch_pos = interpolate(patch_pos, mode="bicubic", antialias=antialias, **size)
    return torch.cat([cls_pos, patch_pos.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
