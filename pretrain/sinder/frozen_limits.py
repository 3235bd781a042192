"""Defects and features of a changed backbone, by the norm limits of the original one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pretrain.config.derived import prefix_tokens
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.detection import alignment, norm_limits
from pretrain.sinder.diagnosis import ALIGNED
from pretrain.sinder.held_out import Measure
from pretrain.sinder.hits import patch_grid, run_block


class _Look(NamedTuple):
    """What a backbone makes of a batch."""

    norms: Tensor  # (L, B, h, w) of the patches after each block
    aligned: Tensor  # (L, B, h, w) whether they lie along the predicted direction: `ALIGNED`
    cls: Tensor  # (B, D) normed
    patches: Tensor  # (B, N, D) normed


class FrozenLimits:
    """Images with the limits and features that the original backbone has on them.

    The norm criterion is relative to an image: without its outliers a lower limit would find others. So each
    image's limit after each block is that of the original.
    """

    @torch.no_grad()
    def __init__(
        self, backbone: VisionTransformer, batches: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> None:
        """Look at the original.

        Args:
            backbone: the original.
            batches: (B, C, S, S') on its device.
            directions: (D,) for each block, on its device.
        """
        self.batches, self.directions = batches, directions
        self.looks = [_look(backbone, images, directions) for images in batches]
        self.limits = [norm_limits(look.norms.flatten(0, 1)) for look in self.looks]  # (L * B, 1, 1)

    @torch.no_grad()
    def measure(self, backbone: VisionTransformer) -> Measure:
        """The figures of a changed backbone; clean is a patch that the original leaves so in all blocks."""
        shares, cls, patches = [], [], []
        for images, before, flat in zip(self.batches, self.looks, self.limits, strict=True):
            limits = flat.unflatten(0, before.norms.shape[:2])
            after = _look(backbone, images, self.directions)
            shares.append(((after.norms > limits) & after.aligned).float().mean(dim=(2, 3)))
            cls.append(cosine_similarity(after.cls, before.cls, dim=-1))
            clean = ~((before.norms > limits) & before.aligned).any(dim=0).flatten(1)
            patches.append(cosine_similarity(after.patches, before.patches, dim=-1)[clean])
        share = torch.cat(shares, dim=1).mean(dim=1)
        return Measure(share.tolist(), float(torch.cat(cls).mean()), float(torch.cat(patches).mean()))


def _look(backbone: VisionTransformer, images: Tensor, directions: Sequence[Tensor]) -> _Look:
    tokens, norms, aligned = backbone.embed(images), [], []
    for index, direction in enumerate(directions):
        tokens = run_block(backbone, index, tokens)
        grid = patch_grid(backbone, tokens, images).float()
        norms.append(grid.norm(dim=-1))
        aligned.append(alignment(grid, direction) >= ALIGNED)
    normed = backbone.norm(tokens).float()
    patches = normed[:, prefix_tokens(backbone.cfg) :]
    return _Look(torch.stack(norms), torch.stack(aligned), normed[:, 0], patches)
