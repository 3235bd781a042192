"""Every random stream of the project, derived in one place.

A stream is named by (seed, purpose, ids): the same name gives the same numbers on every rank, in every
worker, after every resume. There is no global generator and nothing to store in a checkpoint.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_key(seed: int, purpose: str, *ids: int | str) -> int:
    """A 128-bit key for one random stream: a hash of its whole name.

    >>> stream_key(0, "mask", 7) == stream_key(0, "mask", 7) != stream_key(0, "mask", 8)
    True
    """
    name = "\x1f".join([str(seed), purpose, *map(str, ids)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def numpy_stream(seed: int, purpose: str, *ids: int | str) -> np.random.Generator:
    """A counter-based NumPy generator for the stream."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, purpose, *ids)))


def torch_stream(
    seed: int, purpose: str, *ids: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator for the stream. CPU and CUDA generators give different numbers for one name."""
    import torch  # here: the sample order and the launcher need the keys without it

    generator = torch.Generator(device)
    generator.manual_seed(stream_key(seed, purpose, *ids) & (2**63 - 1))
    return generator
