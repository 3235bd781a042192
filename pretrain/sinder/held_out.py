"""What a change of the weights does to images: defects, by the original's thresholds, and features."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pretrain.analysis.outliers import norm_limits
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.detection import ALIGNED, ANGLE_THRESHOLD, MIN_PATCHES
from pretrain.sinder.look import Look, look


@dataclass(frozen=True)
class Measure:
    """Figures of one state of a backbone, against the original one."""

    by_angle: list[float]  # share of defective patches after each block; 0 on grids below `MIN_PATCHES`
    by_both: list[float]  # by their norm, and along the direction
    cls_cosine: float  # mean over images, of the normed class tokens
    patch_cosine: float  # mean over patches that were clean in the original, of the normed patch tokens

    @property
    def drift(self) -> tuple[float, float]:
        """Cosines of class tokens and clean patches."""
        return self.cls_cosine, self.patch_cosine


class Original:
    """An original's features and thresholds, for each image after each block.

    The criteria are relative to an image: they would judge what is left of repaired defects by lower limits.
    """

    def __init__(self, seen: Look) -> None:
        """Take its thresholds.

        Args:
            seen: of the original, along the directions that its weights predict.
        """
        size, cosines = seen.norms.shape[:2], seen.cosines.flatten(2)
        self.norm_limits = norm_limits(seen.norms.flatten(0, 1)).unflatten(0, size)  # (n, L, 1, 1)
        self.angle_limits = torch.full((1,), 2.0)  # above every cosine
        if cosines.shape[2] >= MIN_PATCHES:
            limits = cosines.mean(dim=2) + ANGLE_THRESHOLD * cosines.std(dim=2)
            self.angle_limits = limits[..., None, None]  # (n, L, 1, 1)
        self.cls, self.patches = seen.cls, seen.patches
        self.clean = ~(self.by_both(seen).any(dim=1) | self.by_angle(seen)[:, -1])  # (n, h, w)

    def by_angle(self, seen: Look) -> Tensor:
        """(n, L, h, w) bool."""
        return seen.cosines > self.angle_limits

    def by_both(self, seen: Look) -> Tensor:
        """(n, L, h, w) bool."""
        return (seen.norms > self.norm_limits) & (seen.cosines >= ALIGNED)

    def measure(self, seen: Look) -> Measure:
        """Figures of a look at the same images along the same directions, by another state or file."""
        kept = cosine_similarity(seen.patches, self.patches, dim=-1)[self.clean]
        return Measure(
            self.by_angle(seen).float().mean(dim=(0, 2, 3)).tolist(),
            self.by_both(seen).float().mean(dim=(0, 2, 3)).tolist(),
            float(cosine_similarity(seen.cls, self.cls, dim=-1).mean()),
            float(kept.mean()),
        )


class HeldOut:
    """Images that a repair never trains on."""

    def __init__(
        self, backbone: VisionTransformer, images: Tensor, directions: Sequence[Tensor], batch_size: int
    ) -> None:
        """Look at the original.

        Args:
            backbone: before the repair.
            images: (n, C, S, S').
            directions: (D,) for each block.
            batch_size: images at once.
        """
        self.images, self.directions, self.batch_size = images, directions, batch_size
        self.original = Original(self._look(backbone))

    def measure(self, backbone: VisionTransformer) -> Measure:
        """The figures of a backbone as it is now."""
        return self.original.measure(self._look(backbone))

    def _look(self, backbone: VisionTransformer) -> Look:
        return look(backbone, self.images, self.directions, self.batch_size)
