"""Does a backbone have singular defects: what its weights predict, what its tokens show, and a verdict."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain.analysis.outliers import norm_outliers
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.after_blocks import after_blocks
from pretrain.sinder.detection import (
    ALIGNED,
    MIN_PATCHES,
    alignment,
    defective_by_angle,
)
from pretrain.sinder.directions import LayerDirection

Verdict = Literal["clean", "mild", "defective", "unknown"]
# of a layer's patches that stand out by angle and by norm, and their norm over that of the others
DEFECTIVE_SHARE, DEFECTIVE_RATIO = 0.002, 3.0
MILD_SHARE, MILD_RATIO = 0.0005, 2.0


@dataclass(frozen=True)
class LayerStatistics:
    """What the patch tokens after one block show, over all images."""

    by_angle: float  # share of patches that stand out by their angle to the predicted direction
    by_norm: float  # share that stand out by their norm
    by_both: float  # share that stand out by their norm and lie along the direction: `ALIGNED`
    norm_ratio: float  # mean norm of those by both over the median of their image's others; 1 without
    predicted_cosine: float  # |cos| of the mean defective token with the predicted direction; 0 without
    between_images: float  # mean |cos| between the images' mean defective tokens; 0 with fewer than two


@dataclass(frozen=True)
class Diagnosis:
    """The verdict and its evidence."""

    verdict: Verdict
    reason: str
    first_layer: int | None  # the first with a defect
    layers: list[LayerStatistics]  # empty without images
    images: int
    map: Tensor | None  # (h, w) share of the images that are defective there, at the worst layer


class Evidence:
    """Sums over images, layer by layer."""

    def __init__(self, directions: Sequence[LayerDirection]) -> None:
        self.directions = [layer.direction.float() for layer in directions]
        self.counts = torch.zeros(
            len(directions), 4, dtype=torch.float64
        )  # patches, by angle, by norm, by both
        self.norms = torch.zeros(
            len(directions), 2, dtype=torch.float64
        )  # sums: of defective ones, of medians of the others
        self.means: list[list[Tensor]] = [[] for _ in directions]
        self.maps: list[Tensor | None] = [None for _ in directions]
        self.images = 0

    def add(self, backbone: VisionTransformer, images: Tensor) -> None:
        """Count the images of a batch (B, C, S, S')."""
        after_blocks(backbone, images, self._count)
        self.images += len(images)

    def _count(self, index: int, patches: Tensor) -> None:
        patches = patches.float()
        norms, cosines = patches.norm(dim=-1), alignment(patches, self.directions[index].to(patches.device))
        by_norm = norm_outliers(norms)
        enough = norms[0].numel() >= MIN_PATCHES
        by_angle = defective_by_angle(cosines) if enough else torch.zeros_like(by_norm)
        both = by_norm & (cosines >= ALIGNED)
        found = [norms.numel(), int(by_angle.sum()), int(by_norm.sum()), int(both.sum())]
        self.counts[index] += torch.tensor(found)
        others = norms.masked_fill(both, torch.nan).flatten(1).nanmedian(dim=1).values
        self.norms[index] += torch.tensor([norms[both].sum().item(), others.sum().item()])
        for image, mask in zip(patches, both, strict=True):
            if mask.any():
                self.means[index].append(image[mask].mean(dim=0).cpu())
        seen = both.float().sum(dim=0).cpu()
        earlier = self.maps[index]
        self.maps[index] = seen if earlier is None else earlier + seen

    def layers(self) -> list[LayerStatistics]:
        """The figures so far."""
        return [self._layer(index) for index in range(len(self.directions))]

    def _layer(self, index: int) -> LayerStatistics:
        patches, by_angle, by_norm, both = self.counts[index].tolist()
        defective, others = self.norms[index].tolist()
        means = torch.stack(self.means[index]) if self.means[index] else None
        return LayerStatistics(
            by_angle / patches,
            by_norm / patches,
            both / patches,
            defective / both / (others / self.images) if both else 1.0,
            float(alignment(means.mean(dim=0), self.directions[index])) if means is not None else 0.0,
            _between(means) if means is not None and len(means) > 1 else 0.0,
        )


def _between(means: Tensor) -> float:
    """Mean |cos| over all pairs of rows."""
    unit = means / means.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).abs()
    number = len(means)
    return float((cosines.sum() - number) / (number * (number - 1)))


def diagnose(
    backbone: VisionTransformer,
    directions: Sequence[LayerDirection],
    batches: Iterable[Tensor],
    advance: Callable[[int], None] = lambda _: None,
) -> Diagnosis:
    """Look at the patch tokens of images after every block.

    Args:
        backbone: on any device.
        directions: predicted from its weights.
        batches: (B, C, S, S') images; none = a verdict of `unknown`, weights alone cannot tell.
        advance: told of images.
    """
    evidence, device = Evidence(directions), next(backbone.parameters()).device
    for images in batches:
        evidence.add(backbone, images.to(device))
        advance(len(images))
    if not evidence.images:
        reason = "weights predict where tokens would grow, not whether images make them; give --images"
        return Diagnosis("unknown", reason, None, [], 0, None)
    layers = evidence.layers()
    verdict, first, reason = judge(layers)
    counted = evidence.maps[worst_layer(layers)]
    share = None if counted is None else counted / evidence.images
    return Diagnosis(verdict, reason, first, layers, evidence.images, share)


def worst_layer(layers: Sequence[LayerStatistics]) -> int:
    """The block after which most patches stand out by both; of equal ones the first."""
    return max(range(len(layers)), key=lambda index: layers[index].by_both)


def judge(layers: Sequence[LayerStatistics]) -> tuple[Verdict, int | None, str]:
    """Verdict, first defective layer, and the reason in words."""
    steps: tuple[tuple[Verdict, float, float], ...] = (
        ("defective", DEFECTIVE_SHARE, DEFECTIVE_RATIO),
        ("mild", MILD_SHARE, MILD_RATIO),
    )
    for verdict, share, ratio in steps:
        for index, layer in enumerate(layers):
            if layer.by_both >= share and layer.norm_ratio >= ratio:
                return verdict, index, _found(index, layer, share, ratio)
    reason = (
        f"after no block at least {100 * MILD_SHARE:g} % of the patches are {MILD_RATIO:g} times as long as "
        f"the others and along the predicted direction (|cos| {ALIGNED:g})"
    )
    return "clean", None, reason


def _found(index: int, layer: LayerStatistics, share: float, ratio: float) -> str:
    return (
        f"after block {index}, {100 * layer.by_both:.2f} % of the patches (limit {100 * share:g} %) are "
        f"{layer.norm_ratio:.1f} times as long as the others (limit {ratio:g}) and along the predicted "
        f"direction (|cos| {layer.predicted_cosine:.2f}, limit {ALIGNED:g})"
    )
