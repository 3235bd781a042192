"""Pixels as PNG, of 8 or 16 bits."""

from typing import Any

import cv2
import numpy as np

MAX_SIDE = 1_000_000  # pixels; libpng's limit
COMPRESSION = 3  # of 9: higher levels take several times as long for a few per cent


def encode_png(pixels: np.ndarray[Any, Any]) -> bytes:
    """(H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, as uint8 or uint16, to a PNG of as many bits.

    Raises:
        ValueError: a side is too long.
    """
    height, width = pixels.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels: a side of a PNG has {MAX_SIDE:,} at most")
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    done, content = cv2.imencode(
        ".png", np.ascontiguousarray(pixels), [cv2.IMWRITE_PNG_COMPRESSION, COMPRESSION]
    )
    assert done, f"no PNG of shape {pixels.shape} and type {pixels.dtype}"
    return content.tobytes()
