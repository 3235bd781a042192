"""Encoded images for tests."""

import io

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """Pixels as the bytes of an image file."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()
