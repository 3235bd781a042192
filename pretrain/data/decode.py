"""An image file to uint8 pixels, as a viewer shows it: turned by EXIF, transparency over white.

The kind of file is judged by its content, never by its name. A header is read, and the size it claims judged,
before memory for pixels is taken.
"""

import numpy as np
import simplejpeg

from pretrain.config.schema import DecodeConfig
from pretrain.data.exif import AS_STORED, TRANSPOSED, jpeg_orientation, turn
from pretrain.data.formats import decode_other
from pretrain.data.pixels import Pixels, check_size, to_luma

DEFAULT = DecodeConfig()
ANY_LEVELS = DecodeConfig(window=[0, 1])
JPEG_START = b"\xff\xd8"
DIRECT_SPACES = frozenset({"YCbCr", "Gray", "RGB"})  # of a JPEG; the others (CMYK) need Pillow's conversion


def decode(
    content: bytes, cfg: DecodeConfig = DEFAULT, channels: int | None = 3, reduction: int = 1
) -> Pixels:
    """An image file as (H, W, channels) uint8.

    Args:
        content: the file.
        cfg: section `data.decode`.
        channels: 1: grey (ITU-R 601 luma of colours), 3: RGB, others: exactly as many as the image has; None:
            as stored.
        reduction: 1, 2, 4 or 8; a JPEG of a common kind comes out smaller by it, each side rounded up.

    Raises:
        ValueError: the bytes are not a complete image that can be read so; says why, in one line.
    """
    pixels = _decode_jpeg(content, cfg, channels, reduction) if content.startswith(JPEG_START) else None
    return decode_other(content, cfg, channels) if pixels is None else pixels


def check_image(content: bytes) -> None:
    """Accept a complete image of whatever channels and levels.

    Raises:
        ValueError: as `decode`.
    """
    decode(content, ANY_LEVELS, None)


def jpeg_size(content: bytes, cfg: DecodeConfig) -> tuple[int, int] | None:
    """(height, width) of a JPEG as `decode` gives it; None where `decode` would not reduce the image."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if space not in DIRECT_SPACES:
        return None
    transposed = cfg.exif_rotation and jpeg_orientation(content) >= TRANSPOSED
    return (width, height) if transposed else (height, width)


def _decode_jpeg(content: bytes, cfg: DecodeConfig, channels: int | None, reduction: int) -> Pixels | None:
    """The common case, faster than Pillow with equal pixels; None where Pillow has to judge."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if space not in DIRECT_SPACES or channels not in (1, 3):
        return None
    check_size(width, height, cfg.max_pixels)
    target = "GRAY" if space == "Gray" and channels == 1 else "RGB"
    least = (-(-height // reduction), -(-width // reduction)) if reduction > 1 else (0, 0)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(content, target, min_height=least[0], min_width=least[1])
    except ValueError:  # also harmless oddities, such as bytes between segments
        return None
    if channels == 1 and target == "RGB":
        pixels = to_luma(pixels)
    orientation = jpeg_orientation(content) if cfg.exif_rotation else AS_STORED
    return np.ascontiguousarray(turn(pixels, orientation))
