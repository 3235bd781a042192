"""The patch tokens after every block, as one ordinary forward makes them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.vit import Features, VisionTransformer
from pretrain.sinder.hits import patch_grid


@torch.no_grad()
def after_blocks(
    backbone: VisionTransformer, images: Tensor, take: Callable[[int, Tensor], None]
) -> Features:
    """Run a batch through a backbone and hand over what each block makes of its patches.

    Hooks see it within the forward, where every engine has the weights; what `take` does not keep is gone
    before the next block. Compiled blocks run as they were written: in another precision and with other
    shapes than in training they would be compiled once more, for minutes.

    Args:
        backbone: in whatever form an engine runs it.
        images: (B, C, S, S') on its device.
        take: called after each block with its index and the patch tokens (B, h, w, D).

    Returns:
        What the forward returns.
    """

    def pass_on(index: int, _block: nn.Module, _inputs: Any, output: Tensor) -> None:
        take(index, patch_grid(backbone, output.unflatten(0, (len(images), -1)), images))

    hooks = [block.register_forward_hook(partial(pass_on, i)) for i, block in enumerate(backbone.blocks)]
    try:
        with torch.compiler.set_stance("force_eager"):
            return backbone([images])[0]
    finally:
        for hook in hooks:
            hook.remove()
