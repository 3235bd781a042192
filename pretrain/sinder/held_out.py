"""What a repair changes on images it never saw: defects, by the original's thresholds, and features."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pretrain.models.vit import VisionTransformer
from pretrain.sinder.detection import ANGLE_THRESHOLD, alignment
from pretrain.sinder.hits import patch_grid, run_block


class Measure(NamedTuple):
    """Figures of one state of a backbone, against the original one."""

    shares: list[float]  # of defective patches after each block, by the original's thresholds
    cls_cosine: float  # mean over images, of the normed class tokens
    patch_cosine: float  # mean over patches that were clean in the original, of the normed patch tokens


class HeldOut:
    """Images with the original's thresholds and features.

    The angle criterion is relative to an image: what is left of repaired defects would be judged by a lower
    threshold. So each image's threshold after each block is that of the original backbone.
    """

    @torch.no_grad()
    def __init__(self, backbone: VisionTransformer, images: Tensor, directions: Sequence[Tensor]) -> None:
        """Look at the original.

        Args:
            backbone: before the repair.
            images: (n, C, S, S') on its device.
            directions: (D,) for each block.
        """
        self.images, self.directions = images, directions
        self.limits: list[Tensor] = []
        clean = None
        for cosines in self._cosines(backbone):
            flat = cosines.flatten(1)
            self.limits.append((flat.mean(dim=1) + ANGLE_THRESHOLD * flat.std(dim=1))[:, None, None])
            clean = cosines <= self.limits[-1]
        assert clean is not None
        self.clean = clean.flatten(1)  # (n, N) by the last block
        self.cls, self.patches = self._features(backbone)

    @torch.no_grad()
    def measure(self, backbone: VisionTransformer) -> Measure:
        """The figures of a backbone as it is now."""
        shares = [
            float((cosines > limit).float().mean())
            for cosines, limit in zip(self._cosines(backbone), self.limits, strict=True)
        ]
        cls, patches = self._features(backbone)
        kept = cosine_similarity(patches, self.patches, dim=-1)[self.clean]
        return Measure(shares, float(cosine_similarity(cls, self.cls, dim=-1).mean()), float(kept.mean()))

    def _cosines(self, backbone: VisionTransformer) -> list[Tensor]:
        """|cos| to the direction after each block, (n, h, w)."""
        tokens, found = backbone.embed(self.images), []
        for index, direction in enumerate(self.directions):
            tokens = run_block(backbone, index, tokens)
            found.append(alignment(patch_grid(backbone, tokens, self.images).float(), direction))
        return found

    def _features(self, backbone: VisionTransformer) -> tuple[Tensor, Tensor]:
        cls, _, patches = backbone([self.images])[0]
        return cls.float(), patches.float()
