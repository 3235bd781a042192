"""What a backbone shows on images, kept for later: norms and angles of patches, and output features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.models.vit import VisionTransformer
from pretrain.sinder.after_blocks import after_blocks
from pretrain.sinder.detection import alignment


@dataclass(frozen=True)
class Look:
    """Of n images through L blocks with h x w patches of width D; fp32 on the CPU."""

    norms: Tensor  # (n, L, h, w) of patch tokens after each block
    cosines: Tensor  # (n, L, h, w) their |cos| with the direction of the block
    cls: Tensor  # (n, D) class token after the final norm
    patches: Tensor  # (n, h, w, D) patch tokens after the final norm


@torch.no_grad()
def look(
    backbone: VisionTransformer,
    images: Tensor,
    directions: Sequence[Tensor],
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Look:
    """Run images through a backbone.

    Args:
        backbone: on any device.
        images: (n, C, S, S') on any device.
        directions: (D,) for each block.
        batch_size: images at once.
        advance: told of images.
    """
    device, parts = next(backbone.parameters()).device, []
    for batch in images.split(batch_size):
        parts.append(_look(backbone, batch.to(device), directions))
        advance(len(batch))
    return Look(*(torch.cat([getattr(part, name) for part in parts]) for name in Look.__dataclass_fields__))


def _look(backbone: VisionTransformer, images: Tensor, directions: Sequence[Tensor]) -> Look:
    norms, cosines = [], []

    def take(index: int, patches: Tensor) -> None:
        patches = patches.float()
        norms.append(patches.norm(dim=-1))
        cosines.append(alignment(patches, directions[index].to(patches.device)))

    output = after_blocks(backbone, images, take)
    patches = output.patches.unflatten(1, norms[0].shape[1:])
    seen = (torch.stack(norms, 1), torch.stack(cosines, 1), output.cls, patches)
    return Look(*(tensor.float().cpu() for tensor in seen))
