"""The data of `loader.py`: JPEGs cut from two photographs, with as many bits a pixel as asked, in shards.

Photographs of about 500 x 375 pixels as in ImageNet: random crops, scales, flips, contrast and brightness of
scikit-learn's two sample images. Grain on two scales, of one strength for the whole data set, brings their
mean size to the number of bits asked.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from pretrain.data.writer import PackedSample, write_shards
from pretrain.seeding import numpy_stream

LONG_SIDE = (400, 600)  # pixels; the other side is 3/4 of it
PORTRAITS = 0.25  # share of images that stand upright
QUALITY = (75, 95)  # of the JPEGs, both included
FULL_COLOUR = 0.25  # share of JPEGs whose colour is not subsampled (4:4:4); the others are 4:2:0
MAX_GRAIN = 64.0  # grey levels
SEARCH_STEPS = 8  # for the grain: to a quarter of a level
SAMPLES_PER_SHARD = 32

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class DataSet(NamedTuple):
    """What was written."""

    shards: list[Path]
    images: int
    bits_per_pixel: float  # mean over all pixels
    kilobytes: float  # mean of an image
    megapixels: float  # likewise


class _Jpeg(NamedTuple):
    content: bytes
    pixels: int


def write_images(folder: Path, count: int, bits: float, seed: int) -> DataSet:
    """Make `count` JPEGs of `bits` bits a pixel, as near as grain can bring them, and pack them."""
    photographs = load_sample_images().images
    jpegs = _with_bits(photographs, count, bits, seed)
    shards = write_shards(_samples(jpegs), folder, "train", SAMPLES_PER_SHARD)
    total = sum(len(jpeg.content) for jpeg in jpegs)
    pixels = sum(jpeg.pixels for jpeg in jpegs)
    return DataSet(shards, count, 8 * total / pixels, total / count / 1e3, pixels / count / 1e6)


def _with_bits(photographs: Sequence[Pixels], count: int, bits: float, seed: int) -> list[_Jpeg]:
    """The images whose grain gives the bits, found by halving: more grain, more bits."""
    low, high = 0.0, MAX_GRAIN
    for _ in range(SEARCH_STEPS):
        grain = (low + high) / 2
        jpegs = [_jpeg(photographs, grain, numpy_stream(seed, "image", i)) for i in range(count)]
        if 8 * sum(len(jpeg.content) for jpeg in jpegs) > bits * sum(jpeg.pixels for jpeg in jpegs):
            high = grain
        else:
            low = grain
    return jpegs


def _jpeg(photographs: Sequence[Pixels], grain: float, rng: np.random.Generator) -> _Jpeg:
    photograph = Image.fromarray(photographs[rng.integers(len(photographs))])
    image = _grained(_toned(_view(photograph, rng), rng), grain, rng)
    file, quality = io.BytesIO(), int(rng.integers(QUALITY[0], QUALITY[1] + 1))
    image.save(file, "jpeg", quality=quality, subsampling=0 if rng.random() < FULL_COLOUR else 2)
    return _Jpeg(file.getvalue(), image.width * image.height)


def _view(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of a photograph, in the size of an image of the data set."""
    long = int(rng.integers(LONG_SIDE[0], LONG_SIDE[1] + 1))
    size = (long * 3 // 4, long) if rng.random() < PORTRAITS else (long, long * 3 // 4)
    scale = min(photograph.width / size[0], photograph.height / size[1]) * rng.uniform(0.6, 1)
    width, height = scale * size[0], scale * size[1]
    left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
    box = (left, top, left + width, top + height)
    view = photograph.resize(size, Image.Resampling.BICUBIC, box=box)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view


def _toned(image: Image.Image, rng: np.random.Generator) -> Pixels:
    """Contrast and brightness of another exposure."""
    contrast, brightness = rng.uniform(0.7, 1.3), rng.uniform(-20, 20)
    return np.clip((np.asarray(image) - 128.0) * contrast + 128 + brightness, 0, 255).astype(np.uint8)


def _grained(pixels: Pixels, grain: float, rng: np.random.Generator) -> Image.Image:
    """With grey noise of single pixels and of squares of four; its strength differs between images."""
    height, width = pixels.shape[:2]
    fine, coarse = rng.normal(size=(height, width)), rng.normal(size=(-(-height // 2), -(-width // 2)))
    noise = fine + coarse.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    noisy = pixels + grain * rng.uniform(0.5, 1.5) * noise[..., None] / np.sqrt(2)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _samples(jpegs: Sequence[_Jpeg]) -> Iterator[PackedSample]:
    for i, jpeg in enumerate(jpegs):
        yield PackedSample(f"{i:06d}", "jpg", jpeg.content, None, {"number": i})
