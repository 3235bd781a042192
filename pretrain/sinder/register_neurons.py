"""Finds register neurons: hidden units that are most active where patches are outliers (arXiv 2506.08010)."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pretrain.analysis.outliers import norm_outliers
from pretrain.config.derived import ffn_hidden_dim, prefix_tokens
from pretrain.errors import InputError
from pretrain.models.block import Block
from pretrain.models.ffn import Mlp, SwiGlu
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.detection import ALIGNED, alignment
from pretrain.sinder.hits import patch_grid, run_block


class RegisterNeuron(NamedTuple):
    """A hidden unit of a block's feed-forward layer."""

    block: int
    unit: int
    score: float  # mean |activation| at the outliers of an image, mean over images


@torch.no_grad()
def find_register_neurons(
    backbone: VisionTransformer,
    batches: Iterable[Tensor],
    direction: Tensor,
    outlier_block: int,
    last_block: int,
    number: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[RegisterNeuron]:
    """Rank the hidden units of the first blocks (paper, section 3; its outliers exceed a fixed norm instead).

    A batch runs twice, first to see its outliers: of activations only sums are kept.

    Args:
        backbone: on any device.
        batches: (B, C, S, S') images; one without outliers counts for nothing.
        direction: (D,) predicted after `outlier_block`: what is long but does not lie along it is no outlier.
        outlier_block: block after which patches are looked at.
        last_block: of the units that are ranked.
        number: of units that are returned.
        advance: told of images.

    Returns:
        The highest scores first.

    Raises:
        InputError: no image has an outlier.
    """
    device = next(backbone.parameters()).device
    sums = torch.zeros(last_block + 1, ffn_hidden_dim(backbone.cfg), dtype=torch.float64)
    images = 0
    for batch in batches:
        outliers = _outliers(backbone, batch.to(device), direction.to(device), outlier_block)
        shown = outliers.any(dim=1)
        if shown.any():
            sums += _activations(backbone, batch.to(device)[shown], outliers[shown], last_block)
            images += int(shown.sum())
        advance(len(batch))
    if not images:
        raise InputError("--images: none of those to find neurons on has an outlier; raise --number")
    scores, places = (sums / images).flatten().topk(min(number, sums.numel()))
    units = sums.shape[1]
    return [
        RegisterNeuron(place // units, place % units, score)
        for place, score in zip(places.tolist(), scores.tolist(), strict=True)
    ]


def _outliers(backbone: VisionTransformer, images: Tensor, direction: Tensor, block: int) -> Tensor:
    """The patches (B, N) that the diagnosis calls defective after a block."""
    tokens = backbone.embed(images)
    for index in range(block + 1):
        tokens = run_block(backbone, index, tokens)
    patches = patch_grid(backbone, tokens, images).float()
    found = norm_outliers(patches.norm(dim=-1)) & (alignment(patches, direction) >= ALIGNED)
    return found.flatten(1)


def _activations(backbone: VisionTransformer, images: Tensor, outliers: Tensor, last_block: int) -> Tensor:
    """Sums over images of the mean |activation| at their outliers: (last_block + 1, M) float64 on the CPU."""
    shares = outliers.float() / outliers.sum(dim=1, keepdim=True)
    prefix, sums = prefix_tokens(backbone.cfg), []

    def look(_layer: nn.Module, inputs: tuple[Tensor]) -> None:
        hidden = inputs[0].unflatten(0, (len(images), -1))[:, prefix:].float()  # (B, N, M)
        sums.append(torch.einsum("bn,bnm->m", shares, hidden.abs()).cpu().double())

    blocks = cast(list[Block], list(backbone.blocks)[: last_block + 1])
    hooks = [_last_linear(block.mlp).register_forward_pre_hook(look) for block in blocks]
    try:
        tokens = backbone.embed(images)
        for index in range(last_block + 1):
            tokens = run_block(backbone, index, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(sums)


def _last_linear(ffn: Mlp | SwiGlu) -> nn.Module:
    """The layer whose input are the activations of the hidden units."""
    return ffn.fc2 if isinstance(ffn, Mlp) else ffn.w3
