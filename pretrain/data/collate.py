"""A slot of groups to a `Batch`: crop-major over the whole micro-batch.

Shapes here: n groups, gs images in a group, B = n * gs, and those of `pretrain.batch`.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pretrain.batch import Batch
from pretrain.data.drop_path import PADDING, Rows
from pretrain.data.slots import SlotArrays


def collate(slot: SlotArrays, position: int, bucket: int = 1) -> Batch:
    """One micro-batch; its crops are views of the slot.

    Args:
        slot: filled.
        position: of the first image.
        bucket: masked patches are padded to a multiple of this.
    """
    size = slot.group_size
    masks = _join_masks(slot)
    return Batch(
        global_crops=torch.from_numpy(slot.global_crops).flatten(0, 1),
        local_crops=torch.from_numpy(slot.local_crops).flatten(0, 1),
        masks=masks,
        mask_indices=_padded(masks.flatten().nonzero().flatten(), bucket),
        mask_weights=_padded(_mask_weights(masks), bucket),
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


def _padded(rows: Tensor, bucket: int) -> Tensor:
    """Zeros up to a multiple of the bucket, at least one: the head always runs. Weight 0 marks padding."""
    missing = -len(rows) % bucket if len(rows) else bucket
    return pad(rows, (0, missing))


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
