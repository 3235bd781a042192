"""The fixed images that a run draws its pictures from."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain.config.schema import DecodeConfig
from pretrain.data.decode import DEFAULT
from pretrain.data.labelled import prepare
from pretrain.data.order import Order
from pretrain.data.reader import Reader
from pretrain.data.shards import list_shards
from pretrain.errors import InputError


def first_images(
    patterns: Sequence[str],
    key_name: str,
    count: int,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int = 3,
    decoding: DecodeConfig = DEFAULT,
) -> Tensor:
    """The first images of shards with or without labels, fewer than `count` where the shards hold fewer.

    Args:
        patterns: of the shards.
        key_name: the setting that holds them, for messages.
        count: images wanted.
        resize: pixels of the shorter side.
        crop: pixels of the square cut from the centre.
        mean: per channel, of pixel / 255.
        std: likewise.
        channels: C of the pixels.
        decoding: section `data.decode`; `scale` is not used.

    Returns:
        (n, C, crop, crop) float32 normalised.

    Raises:
        InputError: a shard cannot be used, or an image is damaged.
    """
    reader = Reader(list_shards(patterns, key_name))
    if not sum(reader.sizes):
        raise InputError(f"{key_name}: the shards hold no sample")
    order = Order(reader.sizes, seed=0, shuffle="none", open_shards=1)
    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    images = []
    for position in range(min(count, len(order))):
        sample = order.at(position)
        item = reader.read(sample.shard, sample.index)
        images.append(prepare(item, key_name, resize, crop, channels, decoding))
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (stacked.float() / 255 - shift) / scale
