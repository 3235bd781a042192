"""Raw levels of any depth to (H, W, C) uint8 with the wanted channels."""

from typing import Any

import numpy as np
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Levels = np.ndarray[Any, np.dtype[Any]]

MAX_LEVEL = 65_535  # of 16 bits


def check_size(width: int, height: int, max_pixels: int, what: str = "pixels") -> None:
    """Refuse what a header claims, before memory is taken.

    Raises:
        ValueError: the image has more than `max_pixels` pixels.
    """
    if width * height > max_pixels:
        limit = f"data.decode.max_pixels={max_pixels}" if what == "pixels" else f"{max_pixels}"
        raise ValueError(f"{width} x {height} {what} are more than {limit}")


def to_uint8(levels: Levels, window: list[float] | None) -> Pixels:
    """Levels of any type, of which `window` becomes 0 to 255, linear, clipped and rounded.

    8 bits stay as they are; the window of unsigned 16 bits is all of them where none is given.

    Raises:
        ValueError: another type, and there is no window.
    """
    if levels.dtype == np.uint8:
        return levels
    if levels.dtype == np.bool_:
        return levels.astype(np.uint8) * np.uint8(255)
    if levels.dtype.kind == "u" and levels.dtype.itemsize == 2:  # of either byte order
        return _scale(np.arange(MAX_LEVEL + 1), window or [0, MAX_LEVEL])[levels]
    if window is None:
        raise ValueError(f"{levels.dtype.name} levels have no fixed range; give data.decode.window")
    return _scale(levels, window)


def _scale(levels: Levels, window: list[float]) -> Pixels:
    low, high = window
    shares = (levels.astype(np.float64) - low) / (high - low)
    return np.rint(np.clip(np.nan_to_num(shares), 0, 1) * 255).astype(np.uint8)


def fit_channels(pixels: Pixels, channels: int | None, rgb: bool) -> Pixels:
    """Pixels (H, W, n) as (H, W, channels).

    Args:
        pixels: as stored.
        channels: 1 takes grey, RGB, and RGB with transparency; so does 3; others n = channels only. None: as
            stored.
        rgb: the first three channels are colours, and a fourth transparency.

    Raises:
        ValueError: it has other channels.
    """
    stored = pixels.shape[2]
    if channels == 3 and stored == 1:
        return np.repeat(pixels, 3, axis=2)
    if rgb and channels in (1, 3):
        colours = over_white(pixels) if stored == 4 else pixels
        return colours if channels == 3 else to_luma(colours)
    check_bands(stored, channels)
    return pixels


def check_bands(stored: int, channels: int | None) -> None:
    """Refuse bands that are not exactly the wanted ones.

    Raises:
        ValueError: `channels` is a number, and another one.
    """
    if channels not in (None, stored):
        raise ValueError(f"has {stored} channels, data.channels={channels}")


def over_white(pixels: Pixels) -> Pixels:
    """(H, W, n + 1) with transparency last, blended over white: (H, W, n)."""
    alpha = pixels[..., -1:].astype(np.uint16)
    blend = pixels[..., :-1] * alpha + (255 - alpha) * 255  # at most 255 x 255
    return ((blend + 127) // 255).astype(np.uint8)


def to_luma(pixels: Pixels) -> Pixels:
    """(H, W, 3) RGB as (H, W, 1) grey: ITU-R 601, as Pillow rounds it."""
    return np.array(Image.fromarray(pixels).convert("L"))[..., None]
