"""Groups of images to a `Batch`: crop-major over the whole micro-batch.

Shapes here: n groups, gs images in a group, B = n * gs, and those of `pretrain.batch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.data.draw_params import Rows as Params
from pretrain.data.drop_path import PADDING, Rows
from pretrain.data.masking import Mask
from pretrain.data.pixels import Pixels


@dataclass(frozen=True)
class Group:
    """The images that share mask budgets and drop-path subsets; rows inside it count `crop * gs + image`."""

    global_crops: Pixels  # (G, gs, C, S, S) uint8
    local_crops: Pixels  # (L, gs, C, s, s) uint8
    masks: Mask  # (G * gs, N)
    drop_global: Rows | None  # (depth, 2, kept) rows of the group's global crops; None = nothing is dropped
    drop_local: Rows | None  # likewise for the local crops
    position: int  # of the first image
    params: tuple[Params, Params] | None = None  # (G, gs, P), (L, gs, P): left for the device

    @property
    def size(self) -> int:
        """gs."""
        return int(self.global_crops.shape[1])


def collate(groups: Sequence[Group]) -> Batch:
    """One micro-batch of equally sized groups, in the order given."""
    masks = _join_masks(groups)
    params = [group.params for group in groups if group.params is not None]
    return Batch(
        global_crops=_join_crops([group.global_crops for group in groups]),
        local_crops=_join_crops([group.local_crops for group in groups]),
        masks=masks,
        mask_indices=_at_least_one(masks.flatten().nonzero().flatten()),
        mask_weights=_at_least_one(_mask_weights(masks)),
        drop_global=_join_rows([group.drop_global for group in groups], groups[0].size),
        drop_local=_join_rows([group.drop_local for group in groups], groups[0].size),
        group_size=groups[0].size,
        position=groups[0].position,
        global_params=_join_crops([kinds[0] for kinds in params]) if params else None,
        local_params=_join_crops([kinds[1] for kinds in params]) if params else None,
    )


def _join_crops(crops: Sequence[Pixels] | Sequence[Params]) -> Tensor:
    """n times (G, gs, ...) to (G * B, ...)."""
    return torch.from_numpy(np.concatenate(crops, axis=1)).flatten(0, 1)


def _join_masks(groups: Sequence[Group]) -> Tensor:
    """n times (G * gs, N) to (G * B, N)."""
    split = [group.masks.reshape(-1, group.size, group.masks.shape[-1]) for group in groups]
    return torch.from_numpy(np.concatenate(split, axis=1)).flatten(0, 1)


def _mask_weights(masks: Tensor) -> Tensor:
    """(M,) float32: for each masked patch 1 / masked patches of its crop."""
    weights = 1 / masks.sum(-1, keepdim=True).clamp(min=1).float()
    return weights.expand_as(masks)[masks]


def _at_least_one(rows: Tensor) -> Tensor:
    """Zero for the row of a batch without masks: the head always runs, and a row of weight 0 is padding."""
    return rows if len(rows) else rows.new_zeros(1)


def _join_rows(rows: Sequence[Rows | None], size: int) -> Tensor | None:
    """n times (depth, 2, kept) rows of a group to (depth, 2, n * kept) of the micro-batch, padding last."""
    present = [part for part in rows if part is not None]
    if not present:
        return None
    moved = [_to_micro_batch(part, i * size, size, len(rows) * size) for i, part in enumerate(present)]
    joined = np.concatenate(moved, axis=-1)
    valid_first = np.argsort(joined == PADDING, axis=-1, kind="stable")
    return torch.from_numpy(np.take_along_axis(joined, valid_first, axis=-1))


def _to_micro_batch(rows: Rows, offset: int, size: int, num_images: int) -> Rows:
    """Row `crop * size + image` of a group becomes `crop * num_images + offset + image`."""
    crop, image = np.divmod(rows, size)
    return np.where(rows == PADDING, PADDING, crop * num_images + offset + image)
