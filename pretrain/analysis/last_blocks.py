"""What DINOv2's linear probes see of labelled images: class tokens of the last blocks, and mean patch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config.derived import vit_shape
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer

BLOCKS = 4


@dataclass(frozen=True)
class LastBlocks:
    """Frozen features of n images, after the final norm; fp32."""

    cls: Tensor  # (n, b, D) class tokens after the last b blocks, the last one at the end
    patch_mean: Tensor  # (n, D) mean of the patches after the last block
    labels: Tensor  # (n,) int64

    def features(self, blocks: int, mean_patch: bool) -> Tensor:
        """Class tokens of the last `blocks` blocks side by side, with the mean patch where asked: (n, W)."""
        tokens = self.cls[:, -blocks:].flatten(1)
        return torch.cat([tokens, self.patch_mean], dim=1) if mean_patch else tokens


@torch.no_grad()
def last_blocks(
    backbone: VisionTransformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    advance: Callable[[int], None] = lambda _: None,
) -> LastBlocks:
    """Run labelled images through a backbone once.

    Args:
        backbone: on any device; features stay there.
        batches: images (b, C, S, S') and labels (b,); b may differ from batch to batch.
        advance: told of images.

    Raises:
        InputError: there is no batch.
    """
    device, depth = next(backbone.parameters()).device, vit_shape(backbone.cfg).depth
    layers = range(max(0, depth - BLOCKS), depth)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for images, labels in batches:
        seen = backbone.intermediate_features(images.to(device), layers)
        tokens = torch.stack([features.cls for features in seen], dim=1).float()
        parts.append((tokens, seen[-1].patches.float().mean(dim=1), labels.long().to(device)))
        advance(len(labels))
    if not parts:
        raise InputError("no labelled images were read; check --train and --test")
    return LastBlocks(*(torch.cat(column) for column in zip(*parts, strict=True)))
