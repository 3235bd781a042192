"""Encoded image to uint8 RGB.

EXIF rotation is not applied: pixels stand as stored, as in DINOv2. Transparency is dropped, not blended.
"""

import io
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

JPEG_START = b"\xff\xd8"
DIRECT_SPACES = frozenset({"YCbCr", "Gray", "RGB"})  # of a JPEG; the others (CMYK) need Pillow's conversion


def decode(content: bytes) -> Pixels:
    """An image file as (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the bytes are not a complete image that can be read; says why.
    """
    pixels = _decode_jpeg(content) if content.startswith(JPEG_START) else None
    return _decode_any(content) if pixels is None else pixels


def _decode_jpeg(content: bytes) -> Pixels | None:
    """The common case, faster than Pillow with equal pixels; None where Pillow has to judge."""
    try:
        if simplejpeg.decode_jpeg_header(content)[2] not in DIRECT_SPACES:
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(content, "RGB")
    except ValueError:  # also harmless oddities, such as bytes between segments
        return None
    return pixels


def _decode_any(content: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.array(_to_rgb(image))  # a copy: torch warns of arrays that cannot be written to
    except UnidentifiedImageError as error:
        raise ValueError("not an image in a known format") from error
    except Exception as error:  # Pillow's plug-ins raise what their parsers happen to meet
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip every value above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range of values; convert it to 8 or 16 bits")
    return image.convert("RGB")
