"""Micro-batches of noise with the shapes, masks and drop-path subsets of real ones: no data set needed."""

import numpy as np

from pretrain.batch import Batch
from pretrain.config.derived import drop_path_rates
from pretrain.config.schema import Config
from pretrain.data.collate import collate
from pretrain.data.drop_path import drop_subsets
from pretrain.data.masking import group_masks
from pretrain.data.slots import GroupArrays, SlotLayout
from pretrain.seeding import numpy_stream


def noise_batch(cfg: Config, images: int, position: int = 0) -> Batch:
    """`images` images, whole groups, uniform noise as uint8; another `position` gives other draws."""
    slot, size = SlotLayout(cfg, images).allocate(), cfg.data.group_size
    for i in range(slot.num_groups):
        fill_with_noise(cfg, slot.group(i), position + i * size)
    return collate(slot, position, cfg.mask.bucket)


def fill_with_noise(cfg: Config, out: GroupArrays, position: int) -> None:
    """Fill the arrays with the group that starts at a position."""
    rng = numpy_stream(cfg.run.seed, "noise", position)
    grid, rates = cfg.data.global_crops.size // cfg.model.patch_size, drop_path_rates(cfg.model)
    for crops in (out.global_crops, out.local_crops):
        crops[:] = rng.integers(0, 256, crops.shape, np.uint8)
    out.masks[:] = group_masks(cfg.mask, grid, len(out.masks), rng)
    for rows, crops in ((out.drop_global, out.global_crops), (out.drop_local, out.local_crops)):
        drawn = drop_subsets(rates, crops.shape[0] * crops.shape[1], rng)
        if rows is not None and drawn is not None:
            rows[:] = drawn
