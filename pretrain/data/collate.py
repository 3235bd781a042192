"""A slot of groups to a `Batch`: crop-major over the whole micro-batch.

Shapes here: n groups, gs images in a group, B = n * gs, and those of `pretrain.batch`.
"""

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.data.drop_path import PADDING, Rows
from pretrain.data.slots import SlotArrays


def collate(slot: SlotArrays, position: int) -> Batch:
    """One micro-batch; its crops are views of the slot.

    Args:
        slot: filled.
        position: of the first image.
    """
    size = slot.group_size
    masks = _join_masks(slot)
    return Batch(
        global_crops=torch.from_numpy(slot.global_crops).flatten(0, 1),
        local_crops=torch.from_numpy(slot.local_crops).flatten(0, 1),
        masks=masks,
        mask_indices=_at_least_one(masks.flatten().nonzero().flatten()),
        mask_weights=_at_least_one(_mask_weights(masks)),
        drop_global=_join_rows(slot.drop_global, size),
        drop_local=_join_rows(slot.drop_local, size),
        group_size=size,
        position=position,
    )


def _join_masks(slot: SlotArrays) -> Tensor:
    """(n, G * gs, N) to (G * B, N)."""
    groups, _, patches = slot.masks.shape
    split = slot.masks.reshape(groups, -1, slot.group_size, patches)
    return torch.from_numpy(split.transpose(1, 0, 2, 3).reshape(-1, patches))


def _mask_weights(masks: Tensor) -> Tensor:
    """(M,) float32: for each masked patch 1 / masked patches of its crop."""
    weights = 1 / masks.sum(-1, keepdim=True).clamp(min=1).float()
    return weights.expand_as(masks)[masks]


def _at_least_one(rows: Tensor) -> Tensor:
    """Zero for the row of a batch without masks: the head always runs, and a row of weight 0 is padding."""
    return rows if len(rows) else rows.new_zeros(1)


def _join_rows(rows: Rows | None, size: int) -> Tensor | None:
    """(n, depth, 2, kept) rows of groups to (depth, 2, n * kept) of the micro-batch, padding last."""
    if rows is None:
        return None
    count = len(rows) * size
    joined = np.concatenate([_to_micro_batch(part, i * size, size, count) for i, part in enumerate(rows)], -1)
    valid_first = np.argsort(joined == PADDING, axis=-1, kind="stable")
    return torch.from_numpy(np.take_along_axis(joined, valid_first, axis=-1))


def _to_micro_batch(rows: Rows, offset: int, size: int, num_images: int) -> Rows:
    """Row `crop * size + image` of a group becomes `crop * num_images + offset + image`."""
    crop, image = np.divmod(rows, size)
    return np.where(rows == PADDING, PADDING, crop * num_images + offset + image)
