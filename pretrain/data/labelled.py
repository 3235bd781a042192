"""Labelled images in stored order, for evaluation."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.data.decode import Pixels, decode
from pretrain.data.order import Order, Sample
from pretrain.data.reader import Item, Reader
from pretrain.data.shards import list_shards
from pretrain.errors import InputError

THREADS = 8  # that decode; the decoders release the interpreter lock


def labelled_batches(
    patterns: Sequence[str],
    key_name: str,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of shards, in the order of the files; the last batch may be smaller.

    Args:
        patterns: of the shards.
        key_name: the setting that holds them, for messages, such as `log.knn.train`.
        resize: pixels of the shorter side, bicubic with antialiasing.
        crop: pixels of the square cut from the centre.
        mean: per channel, of pixel / 255.
        std: likewise.
        batch_size: images in a batch.

    Yields:
        (b, 3, crop, crop) float32 normalised and (b,) int64.

    Raises:
        InputError: a shard cannot be used, or a sample has no label.
    """
    if crop > resize:
        raise InputError(
            f"{key_name}: a centre crop of {crop} pixels does not fit a shorter side of {resize}"
        )
    reader = Reader(list_shards(patterns, key_name))
    order = Order(reader.sizes, seed=0, shuffle="none", open_shards=1)
    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(order), batch_size):
            positions = range(start, min(start + batch_size, len(order)))
            items = [_labelled(reader, order.at(position), key_name) for position in positions]
            images = np.stack(list(pool.map(lambda item: _prepare(item, resize, crop, key_name), items)))
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
            yield (pixels - shift) / scale, torch.tensor([item.label for item in items])


def _labelled(reader: Reader, sample: Sample, key_name: str) -> Item:
    item = reader.read(sample.shard, sample.index)
    if item.label is None:
        raise InputError(
            f"{key_name}: {reader.shards[sample.shard]}: sample {item.key} has no label (.cls member); "
            f"pack with class folders or labels"
        )
    return item


def _prepare(item: Item, resize: int, crop: int, key_name: str) -> Pixels:
    """(crop, crop, 3) of one item."""
    try:
        return centre_crop(resize_shorter(decode(item.image), resize), crop)
    except ValueError as error:
        raise InputError(f"{key_name}: sample {item.key}: {error}; re-pack the shard without it") from error


def resize_shorter(image: Pixels, size: int) -> Pixels:
    """An (H, W, 3) image with its shorter side made `size` pixels; untouched where it has that size."""
    height, width = image.shape[:2]
    short = min(height, width)
    if short == size:
        return image
    target = (int(size * width / short), int(size * height / short))
    return np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))


def centre_crop(image: Pixels, size: int) -> Pixels:
    """(size, size, 3) from the middle of an image that is at least as large."""
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]
