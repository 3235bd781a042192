"""Encoded images for tests."""

import io

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    """Pixels as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()
