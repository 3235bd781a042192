"""Labelled images in stored order, for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.config.schema import DecodeConfig
from pretrain.data.decode import DEFAULT, decode
from pretrain.data.order import Order, Sample
from pretrain.data.pixels import Pixels
from pretrain.data.reader import CorruptSample, Item, Reader
from pretrain.data.shards import list_shards
from pretrain.errors import InputError

Change = Callable[[str, Pixels], Pixels]  # of a sample's key and pixels (H, W, C) uint8
THREADS = 8  # that decode; the decoders release the interpreter lock
REPACK = "re-pack the shard without it"


def labelled_batches(
    patterns: Sequence[str],
    key_name: str,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    channels: int = 3,
    decoding: DecodeConfig = DEFAULT,
    change: Change | None = None,
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
        channels: C of the pixels.
        decoding: section `data.decode`; `scale` is not used.
        change: makes other pixels of each sample's, such as corrupted ones, at the size of the crop.

    Yields:
        (b, C, crop, crop) float32 normalised and (b,) int64.

    Raises:
        InputError: a shard or an image cannot be used, or a sample has no label.
    """
    if crop > resize:
        raise InputError(
            f"{key_name}: a centre crop of {crop} pixels does not fit a shorter side of {resize}"
        )
    reader = Reader(list_shards(patterns, key_name))
    if not sum(reader.sizes):
        raise InputError(f"{key_name}: the shards hold no sample")
    order = Order(reader.sizes, seed=0, shuffle="none", open_shards=1)
    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def prepared(item: Item) -> Pixels:
        return prepare(item, key_name, resize, crop, channels, decoding)

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(order), batch_size):
            positions = range(start, min(start + batch_size, len(order)))
            items = [_labelled(reader, order.at(position), key_name) for position in positions]
            images = pool.map(lambda item: _changed(item, prepared(item), change), items)
            pixels = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).contiguous().float() / 255
            yield (pixels - shift) / scale, torch.tensor([item.label for item in items])


def _changed(item: Item, pixels: Pixels, change: Change | None) -> Pixels:
    return pixels if change is None else change(item.key, pixels)


def _labelled(reader: Reader, sample: Sample, key_name: str) -> Item:
    try:
        item = reader.read(sample.shard, sample.index)
    except CorruptSample as error:
        raise InputError(f"{key_name}: {error}; {REPACK}") from error
    if item.label is None:
        raise InputError(
            f"{key_name}: {item.shard}: sample {item.key} has no label (.cls member); "
            f"pack with class folders or labels"
        )
    return item


def prepare(
    item: Item, key_name: str, resize: int, crop: int, channels: int = 3, decoding: DecodeConfig = DEFAULT
) -> Pixels:
    """The resized centre of one item, (crop, crop, C) uint8; arguments as for `labelled_batches`.

    Raises:
        InputError: the image is damaged, or has other channels.
    """
    try:
        return centre_crop(resize_shorter(decode(item.image, decoding, channels), resize), crop)
    except ValueError as error:
        raise InputError(f"{key_name}: {item.shard}: sample {item.key}: {error}; {REPACK}") from error


def resize_shorter(image: Pixels, size: int) -> Pixels:
    """An (H, W, C) image with its shorter side made `size` pixels; untouched where it has that size."""
    height, width = image.shape[:2]
    short = min(height, width)
    if short == size:
        return image
    target = (int(size * width / short), int(size * height / short))
    bands = [image] if image.shape[2] == 3 else [image[..., i] for i in range(image.shape[2])]
    resized = [np.asarray(Image.fromarray(band).resize(target, Image.Resampling.BICUBIC)) for band in bands]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=-1)


def centre_crop(image: Pixels, size: int) -> Pixels:
    """(size, size, C) from the middle of an image that is at least as large."""
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]
