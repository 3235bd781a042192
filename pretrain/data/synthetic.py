"""Micro-batches of noise with the shapes, masks and drop-path subsets of real ones: no data set needed."""

import numpy as np

from pretrain.batch import Batch
from pretrain.config.derived import drop_path_rates
from pretrain.config.schema import Config
from pretrain.data.collate import Group, collate
from pretrain.data.drop_path import drop_subsets
from pretrain.data.masking import group_masks
from pretrain.data.pixels import Pixels
from pretrain.seeding import numpy_stream


def noise_batch(cfg: Config, images: int, position: int = 0) -> Batch:
    """`images` images, whole groups, uniform noise as uint8; another `position` gives other draws."""
    size = cfg.data.group_size
    return collate([noise_group(cfg, first) for first in range(position, position + images, size)])


def noise_group(cfg: Config, position: int) -> Group:
    """The group of `data.group_size` images that starts at a position."""
    data, size, local = cfg.data, cfg.data.group_size, cfg.data.local_crops
    rng = numpy_stream(cfg.run.seed, "noise", position)
    grid, rates = data.global_crops.size // cfg.model.patch_size, drop_path_rates(cfg.model)
    return Group(
        global_crops=_noise((2, size, data.channels), data.global_crops.size, rng),
        local_crops=_noise((local.number, size, data.channels), local.size, rng),
        masks=group_masks(cfg.mask, grid, 2 * size, rng),
        drop_global=drop_subsets(rates, 2 * size, rng),
        drop_local=drop_subsets(rates, local.number * size, rng),
        position=position,
    )


def _noise(shape: tuple[int, ...], side: int, rng: np.random.Generator) -> Pixels:
    """(crops, images, channels, side, side) uint8, `shape` being the first three."""
    return rng.integers(0, 256, (*shape, side, side), np.uint8)
