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

    global_crops: Tensor  # (G*B, C, S, S), uint8 from the loader, float32 after normalisation
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
    global_params: Tensor | None = None  # (G*B, P) float32: what is left to do to the crops, where the device
    local_params: Tensor | None = None  # (L*B, P) augments; on the CPU also in a batch on a device

    @property
    def num_images(self) -> int:
        """B."""
        return self.masks.shape[0] // 2

    def _map(self, function: Any) -> "Batch":
        tensors = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        moved = self._map(lambda t: t.to(device, non_blocking=non_blocking))
        return replace(moved, global_params=self.global_params, local_params=self.local_params)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, so that copies to a GPU overlap with compute."""
        return self._map(Tensor.pin_memory)

    def normalize(self, mean: Tensor, std: Tensor) -> "Batch":
        """Crops as float32, `(pixel / 255 - mean) / std`; mean and std are (C,), on the batch's device."""

        def scaled(crops: Tensor) -> Tensor:
            shift, scale = mean.view(-1, 1, 1) * 255, 1 / (std.view(-1, 1, 1) * 255)
            return (crops.float() - shift) * scale

        return replace(self, global_crops=scaled(self.global_crops), local_crops=scaled(self.local_crops))
