"""Small uint8 images to corrupt: pieces of two photos, and smooth ones."""

from functools import cache

import cv2
import numpy as np
from sklearn.datasets import load_sample_images

from pretrain.data.pixels import Pixels


@cache
def photos(size: int) -> tuple[Pixels, ...]:
    """Eight squares of two photos, made smaller to `size` pixels: (size, size, 3) each; not to be changed."""
    pieces = [
        photo[top : top + 213, left : left + 213]
        for photo in load_sample_images().images
        for top, left in ((0, 0), (0, 213), (213, 213), (213, 426))
    ]
    return tuple(cv2.resize(piece, (size, size), interpolation=cv2.INTER_AREA) for piece in pieces)


def smooth(size: int, seed: int, channels: int = 3) -> Pixels:
    """Waves of random directions around grey, one to three per image side: (size, size, channels)."""
    rng, axis = np.random.default_rng(seed), np.linspace(0, 2 * np.pi, size)
    waves = [
        np.sin(rng.integers(1, 4) * axis[:, None] + rng.integers(1, 4) * axis + rng.uniform(0, 6))
        for _ in range(channels)
    ]
    return (128 + 80 * np.stack(waves, axis=2)).astype(np.uint8)
