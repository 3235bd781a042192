"""scikit-learn's handwritten digits as shards: a real labelled image set that needs no download."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pretrain.data.writer import write_shards

SIZE = 32  # pixels; the originals are 8 x 8 with values 0 to 16
NUM_TRAIN = 1_400  # of 1,797; the rest is held out


def write_digits(folder: Path) -> None:
    """Write `train-000000.tar` (1,400 images) and `test-000000.tar` (397), 32-pixel RGB PNGs, to a folder."""
    order = np.random.default_rng(0).permutation(len(load_digits().target))
    for prefix, chosen in (("train", order[:NUM_TRAIN]), ("test", order[NUM_TRAIN:])):
        write_shards(_samples(chosen.tolist()), folder, prefix, NUM_TRAIN)


def _samples(chosen: list[int]) -> Iterator[tuple[str, str, bytes, int | None, dict[str, Any]]]:
    digits = load_digits()
    for index in chosen:
        small = Image.fromarray(np.round(digits.images[index] * (255 / 16)).astype(np.uint8))
        file = io.BytesIO()
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(file, "PNG")
        label = int(digits.target[index])
        yield f"{index:06d}", "png", file.getvalue(), label, {"source": f"sklearn digits {index}"}
