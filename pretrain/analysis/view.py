"""What a backbone shows on a few images, kept for pictures and figures."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pretrain.analysis.maps import cls_attention
from pretrain.analysis.taps import Place, tapped
from pretrain.config.derived import vit_shape
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer


@dataclass(frozen=True)
class View:
    """Of n images through L blocks with h x w patches of width D; fp32 on the CPU."""

    norms: Tensor  # (n, L, h, w) of patch tokens after each block
    attention: Tensor  # (n, H, h, w) shares of the class token's attention in one block
    patches: Tensor  # (n, h, w, D) patch tokens after the final norm


@torch.no_grad()
def view(
    backbone: VisionTransformer,
    images: Tensor,
    batch_size: int,
    block: int = -1,
    advance: Callable[[int], None] = lambda _: None,
) -> View:
    """Run images through a backbone.

    Args:
        backbone: on any device.
        images: (n, C, S, S').
        batch_size: images at once.
        block: whose attention is kept; -1 is the last.
        advance: told of images.

    Raises:
        InputError: there is no such block.
    """
    depth = vit_shape(backbone.cfg).depth
    if not -depth <= block < depth:
        raise InputError(f"--block {block}: the model has blocks 0 to {depth - 1}")
    device, parts = next(backbone.parameters()).device, []
    for batch in images.split(batch_size):
        parts.append(_view(backbone, batch.to(device), block, depth))
        advance(len(batch))
    return View(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(View)))


def _view(backbone: VisionTransformer, images: Tensor, block: int, depth: int) -> View:
    rows, cols = (side // backbone.patch_size for side in images.shape[-2:])
    norms: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[Tensor], None]:
        def look(tokens: Tensor) -> None:
            norms[index] = tokens[:, -rows * cols :].float().norm(dim=-1).unflatten(1, (rows, cols))

        return look

    with tapped(backbone, len(images), {Place(index, "RC2"): keep(index) for index in range(depth)}):
        output = backbone([images])[0].patches
    seen = (
        torch.stack([norms[index] for index in range(depth)], dim=1),
        cls_attention(backbone, images, block),
        output.unflatten(1, (rows, cols)),
    )
    return View(*(tensor.float().cpu() for tensor in seen))
