"""Backbones for other image sizes, patch sizes and numbers of channels."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pretrain.config.derived import position_grid
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.models.pos_embed import interpolate_pos_embed
from pretrain.surgery.layouts import State

Result = tuple[dict[str, Tensor], ModelConfig]
PROJECTION = "patch_embed.proj.weight"


def resize_positions(state: State, model: ModelConfig, size: tuple[int, int]) -> Result:
    """Learned positions for another image size (rows, columns in pixels), by the model's own interpolation.

    At that size the features are those that the model has now. The class token's position stays.

    Raises:
        InputError: the size is no multiple of the patch size.
    """
    patch = model.patch_size
    for pixels in size:
        if pixels < patch or pixels % patch:
            near = max(pixels // patch, 1) * patch
            raise InputError(
                f"--image-size: {pixels} px is not a multiple of the patch size {patch}; use {near}, say"
            )
    rows, columns = size
    grid, stored = (rows // patch, columns // patch), position_grid(model)
    resized = replace(model, img_size=rows, img_width=None if rows == columns else columns)
    if grid == stored:
        return dict(state), resized
    positions = interpolate_pos_embed(
        state["pos_embed"], stored, grid, model.pos_embed_offset, model.pos_embed_antialias
    )
    return {**state, "pos_embed": positions}, resized


def resize_patch(state: State, model: ModelConfig, patch_size: int) -> Result:
    """Patch embedding for another patch size; the position grid stays, so the image size follows the patch.

    The weights are FlexiViT's (arXiv 2212.08013, section 3.4): B resizes patches, and (B^T)^+ w gives on
    resized patches what w gives on the original ones: exactly when they grow, at least squares when they
    shrink.

    Raises:
        InputError: a patch of no pixels.
    """
    if patch_size < 1:
        raise InputError(f"--patch-size: {patch_size} must be at least 1")
    rows, columns = position_grid(model)
    resized = replace(
        model,
        patch_size=patch_size,
        img_size=rows * patch_size,
        img_width=None if rows == columns else columns * patch_size,
    )
    if patch_size == model.patch_size:
        return dict(state), resized
    weight = state[PROJECTION]  # (D, C, p, p)
    inverse = torch.linalg.pinv(resize_matrix(model.patch_size, patch_size).T)  # (p'^2, p^2)
    flat = weight.double().flatten(2) @ inverse.T  # (D, C, p'^2)
    projection = flat.unflatten(2, (patch_size, patch_size)).to(weight.dtype)
    return {**state, PROJECTION: projection.contiguous()}, resized


def resize_matrix(old: int, new: int) -> Tensor:
    """B (new^2, old^2) float64: antialiased bicubic resizing of a patch, as a matrix on its pixels."""
    pixels = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    return interpolate(pixels, size=(new, new), mode="bicubic", antialias=True).flatten(1).T


def resize_channels(state: State, model: ModelConfig, channels: int) -> Result:
    """Patch embedding for another number of input channels; the sum over channels stays.

    Channel j takes the weights of channel j mod C, shared equally among those that take the same; with fewer
    channels than before, j sums all channels c with c mod N = j. A grey image copied into every channel gives
    the same tokens as before.

    Raises:
        InputError: no channels.
    """
    if channels < 1:
        raise InputError(f"--to: {channels} channels must be at least 1")
    weight = state[PROJECTION]  # (D, C, p, p)
    before = weight.shape[1]
    share = torch.zeros(channels, before, dtype=torch.float64)
    for index in range(max(channels, before)):
        share[index % channels, index % before] = 1.0
    share /= share.sum(dim=0)
    projection = torch.einsum("nc,dcij->dnij", share, weight.double()).to(weight.dtype)
    return {**state, PROJECTION: projection.contiguous()}, replace(model, in_channels=channels)
