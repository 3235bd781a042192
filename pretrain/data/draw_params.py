"""What remains to be done to a crop after resizing, as a row of numbers that travels to the device. No torch.

Whole steps and fixed-point weights instead of the drawn amounts, where OpenCV or Pillow rounds them first: so
the device computes with the same numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.data.colour import BLUR_KERNEL, blur_taps
from pretrain.data.draws import ADJUSTMENTS, CropDraw

Rows = np.ndarray[Any, np.dtype[np.float32]]

SLOTS = len(ADJUSTMENTS)  # colour changes, in the order of use
FLIP = 0  # 1: mirror
KINDS = slice(1, 1 + SLOTS)  # places in ADJUSTMENTS; NONE where fewer than four are left
AMOUNTS = slice(KINDS.stop, KINDS.stop + SLOTS)  # factors; for hue whole steps, 256 to the circle
GRAYSCALE = AMOUNTS.stop  # 1: luma in all channels
TAPS = slice(GRAYSCALE + 1, GRAYSCALE + 1 + BLUR_KERNEL // 2 + 1)  # blur weights from edge to centre; 0: none
SOLARIZE = TAPS.stop  # 1: invert the bright levels
WIDTH = SOLARIZE + 1  # P
NONE = -1


def encode_draws(draws: Sequence[CropDraw]) -> Rows:
    """(n, P) float32: a row per crop, without its box."""
    rows = np.zeros((len(draws), WIDTH), np.float32)
    rows[:, KINDS] = NONE
    for row, draw in zip(rows, draws, strict=True):
        row[FLIP], row[GRAYSCALE], row[SOLARIZE] = draw.flip, draw.grayscale, draw.solarize
        for slot, (name, amount) in enumerate(draw.jitter):
            row[KINDS][slot] = ADJUSTMENTS.index(name)
            row[AMOUNTS][slot] = int(amount * 255) & 255 if name == "hue" else amount
        if draw.sigma is not None:
            row[TAPS] = blur_taps(draw.sigma)
    return rows
