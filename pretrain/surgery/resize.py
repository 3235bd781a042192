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
MAX_SIZE, MAX_PATCH, MAX_CHANNELS = 8192, 256, 1024  # beyond them a number is a slip
PROJECTION = "patch_embed.proj.weight"


def resize_positions(state: State, model: ModelConfig, size: tuple[int, int]) -> Result:
    """Learned positions for another image size (rows, columns in pixels), by the model's own interpolation.

    At that size the features are those that the model has now. The class token's position stays.

    Raises:
        InputError: the size is no multiple of the patch size.
    """
    patch = model.patch_size
    for pixels in size:
        if not patch <= pixels <= MAX_SIZE:
            raise InputError(f"--image-size: {pixels} px must be from the patch size {patch} to {MAX_SIZE}")
        if pixels % patch:
            near = pixels // patch * patch
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
    if not 1 <= patch_size <= MAX_PATCH:
        raise InputError(f"--patch-size: {patch_size} must be from 1 to {MAX_PATCH}")
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
    inverse = torch.linalg.pinv(axis_matrix(model.patch_size, patch_size).T)  # (p', p)
    projection = (inverse @ weight.double() @ inverse.T).to(weight.dtype)
    return {**state, PROJECTION: projection.contiguous()}, resized


def axis_matrix(old: int, new: int) -> Tensor:
    """b (new, old) float64: antialiased bicubic resizing of one axis; B of a whole patch is b kron b."""
    pixels = torch.eye(old, dtype=torch.float64).view(old, 1, 1, old)
    return interpolate(pixels, size=(1, new), mode="bicubic", antialias=True).flatten(1).T


def resize_channels(state: State, model: ModelConfig, channels: int) -> Result:
    """Patch embedding for another number of input channels; the sum over channels stays.

    Channel j takes the weights of channel j mod C, shared equally among those that take the same; with fewer
    channels than before, j sums all channels c with c mod N = j. A grey image copied into every channel gives
    the same tokens as before.

    Raises:
        InputError: no channels.
    """
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(f"--to: {channels} channels must be from 1 to {MAX_CHANNELS}")
    weight = state[PROJECTION]  # (D, C, p, p)
    before = weight.shape[1]
    share = torch.zeros(channels, before, dtype=torch.float64)
    for index in range(max(channels, before)):
        share[index % channels, index % before] = 1.0
    share /= share.sum(dim=0)
    projection = torch.einsum("nc,dcij->dnij", share, weight.double()).to(weight.dtype)
    return {**state, PROJECTION: projection.contiguous()}, replace(model, in_channels=channels)
