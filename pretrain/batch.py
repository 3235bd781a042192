"""`Batch`: one micro-batch as the model takes it.

Shape legend of the whole package: B images in the micro-batch, G global crops an image (2), L local crops an
image, S and s their sizes in pixels, C channels, N patch tokens of a global crop, R registers, D embed dim, H
heads, K prototypes, M masked patches in the batch, T tokens of all sequences packed one after another.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B images, cut into crops.

    Crop-major: global crop g of image b is row `g * B + b`, and the local crops alike. Images stand in the
    order of their positions, whole groups of `group_size` one after another.
    """

    global_crops: Tensor  # (G*B, C, S, S) uint8 as loaded, or float32 normalised
    local_crops: Tensor  # (L*B, C, s, s), likewise
    masks: Tensor  # (G*B, N) bool: patches hidden from the student
    mask_indices: Tensor  # (M,) int64 into the flattened masks, M >= 1
    mask_weights: Tensor  # (M,) float32: 1 / masked patches of the same crop; 0 marks padding
    drop_global: (
        Tensor | None
    )  # (depth, 2, kept) int64 rows of global_crops whose residual branch runs; None = all
    drop_local: Tensor | None  # (depth, 2, kept) the same for local_crops; axis 1: attention, feed-forward
    group_size: int  # images that share mask budgets, KoLeo neighbours and drop-path subsets
    position: int  # sample counter of the first image since the start of the run

    @property
    def num_images(self) -> int:
        """B."""
        return self.masks.shape[0] // 2

    def _map(self, function: Any) -> "Batch":
        tensors = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def clone(self) -> "Batch":
        """A copy that stays when the loader goes on."""
        return self._map(Tensor.clone)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory, which another stream filled, until the work queued on this one is done."""
        self._map(lambda t: t.record_stream(stream))

    def normalize(self, mean: Tensor, std: Tensor) -> "Batch":
        """The batch with crops as float32; see `normalize_pixels`."""
        crops = (normalize_pixels(crops, mean, std) for crops in (self.global_crops, self.local_crops))
        return replace(self, global_crops=next(crops), local_crops=next(crops))


def normalize_pixels(crops: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(n, C, S, S) uint8 as float32, `(pixel / 255 - mean) / std`; mean and std are (C,), on its device."""
    return (crops.float() - mean.view(-1, 1, 1) * 255) * (1 / (std.view(-1, 1, 1) * 255))
