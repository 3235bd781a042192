"""Random numbers of replacements, functions of (seed, image, block, position): batches do not matter.

Numbers are drawn on the CPU, so that every device sees the same.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import InputError
from pretrain.seeding import numpy_stream

Permutation = Callable[[int, int, Sequence[str]], Tensor]  # seed, block, keys of B images to (B,) int64


def normals(seed: int, purpose: str, keys: Sequence[str], block: int, slots: Tensor, width: int) -> Tensor:
    """Standard normal numbers (B, S, width) fp32 for the positions `slots` (B, S) of images."""
    rows = [
        numpy_stream(seed, "registers", purpose, key, block, slot).standard_normal(width, dtype=np.float32)
        for key, own in zip(keys, slots.tolist(), strict=True)
        for slot in own
    ]
    return torch.from_numpy(np.stack(rows)).unflatten(0, tuple(slots.shape))


def choices(seed: int, keys: Sequence[str], block: int, number: int) -> Tensor:
    """One of `number` calibration images for each image, (B,) int64; another one at each block."""
    drawn = [int(numpy_stream(seed, "registers", "bank", key, block).integers(number)) for key in keys]
    return torch.tensor(drawn)


def derangement(seed: int, block: int, keys: Sequence[str]) -> Tensor:
    """A permutation of B images that leaves none in its place, (B,) int64; all such are as likely.

    Raises:
        InputError: there is one image only.
    """
    number = len(keys)
    if number < 2:
        raise InputError("shuffle: a batch of one image has no other one to take tokens from; use bank")
    stream = numpy_stream(seed, "registers", "shuffle", block, *keys)
    while True:  # about e tries
        drawn = stream.permutation(number)
        if (drawn != np.arange(number)).all():
            return torch.from_numpy(drawn)
