"""Image files other than common JPEGs: PNG, WebP, TIFF, BMP, GIF, PPM, and JPEGs that need Pillow.

Pillow reads them, except where it would cut 16 bits to 8 or take several bands for one.
"""

import io
import struct
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from pretrain.config.schema import DecodeConfig
from pretrain.data.exif import AS_STORED, TURN_BACK, image_orientation, jpeg_orientation, turn
from pretrain.data.pixels import Levels, Pixels, check_bands, check_size, fit_channels, to_uint8
from pretrain.data.tiff import read_bands, read_tags

Image.MAX_IMAGE_PIXELS = None  # the limit is `data.decode.max_pixels`; Pillow would warn of its own

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "TIFF",
    "BMP",
    "GIF",
    "PPM",
)  # others may run programs to open
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_COLOUR = frozenset({2, 4, 6})  # colour types that Pillow cuts to 8 bits: RGB, grey + alpha, RGB + alpha
COLOUR_BANDS = 4  # of a pixel; an image of more bands may have as many fewer pixels
MAX_REASON = 200  # letters of what a parser has to say
GREY, DEEP = ("1", "L"), ("I", "F")  # modes of Pillow: 8 bits at most; 32 bits


class Stored(NamedTuple):
    """An image as it lies in the file."""

    levels: Levels  # (H, W, n)
    rgb: bool  # the first three are colours, and a fourth transparency
    orientation: int  # how it is to be turned, as in EXIF


def decode_other(content: bytes, cfg: DecodeConfig, channels: int | None) -> Pixels:
    """As `pretrain.data.decode.decode`.

    Raises:
        ValueError: likewise.
    """
    if not content:
        raise ValueError("is empty (0 bytes)")
    try:
        stored = _read(content, cfg, channels)
    except Exception as error:  # the parsers of Pillow and tifffile raise what they happen to meet
        raise ValueError(_reason(error)) from error
    pixels = fit_channels(_to_uint8(stored, cfg.window), channels, stored.rgb)
    return np.ascontiguousarray(turn(pixels, stored.orientation))


def stored_size(content: bytes) -> tuple[int, int]:
    """(width, height) as stored, from the header.

    Raises:
        ValueError: the bytes are no image in a known format.
    """
    try:
        if tags := read_tags(content):
            return tags.width, tags.height
        if size := webp_size(content):
            return size
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.size
    except Exception as error:  # as above
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    name = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return name + " ".join(str(error).split())[:MAX_REASON]


def _read(content: bytes, cfg: DecodeConfig, channels: int | None) -> Stored:
    tags = read_tags(content)
    if tags is not None:
        check_size(tags.width, tags.height, cfg.max_pixels)
        turned = tags.orientation if cfg.exif_rotation else AS_STORED
        if tags.colour_of_16_bits:
            return Stored(_read_colour(content), True, turned)
        if not tags.read_by_pillow:
            if not tags.rgb:  # before memory is taken for bands that nobody wants
                check_bands(tags.samples, channels)
            check_size(tags.width * tags.samples, tags.height, COLOUR_BANDS * cfg.max_pixels, "levels")
            return Stored(read_bands(content, tags), tags.rgb, turned)
    if size := webp_size(content):  # Pillow takes memory for the whole picture when it opens one
        check_size(*size, cfg.max_pixels)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        check_size(*image.size, cfg.max_pixels)
        if _is_deep_png(content):
            return Stored(_read_colour(content), True, _orientation(image, content, cfg))
        levels, rgb = _levels(image, channels)
        if tags is None:
            return Stored(levels, rgb, _orientation(image, content, cfg))
        # Pillow turns TIFFs, and only these, by itself.
        back = TURN_BACK.get(tags.orientation, tags.orientation)
        return Stored(levels, rgb, AS_STORED if cfg.exif_rotation else back)


def _orientation(image: Image.Image, content: bytes, cfg: DecodeConfig) -> int:
    if not cfg.exif_rotation:
        return AS_STORED
    return jpeg_orientation(content) if image.format in ("JPEG", "MPO") else image_orientation(image)


def _levels(image: Image.Image, channels: int | None) -> tuple[Levels, bool]:
    """(H, W, n) of the first frame, and whether they are colours."""
    image.load()
    if image.mode.startswith("I;16") or image.mode in DEEP:
        levels = np.array(image)[..., None]
        return levels.astype(np.uint16) if image.format == "PPM" and image.mode == "I" else levels, False
    if channels not in (1, 3):
        bands = np.array(image)
        return bands.reshape(*bands.shape[:2], -1), image.mode in ("RGB", "RGBA")
    if image.has_transparency_data:
        return np.array(image.convert("RGBA")), True
    if image.mode in GREY:
        return np.array(image.convert("L"))[..., None], False
    return np.array(image.convert("RGB")), True


def _is_deep_png(content: bytes) -> bool:
    """A PNG of several channels of 16 bits."""
    return content.startswith(PNG_START) and content[24] == 16 and content[25] in PNG_COLOUR


def _read_colour(content: bytes) -> Levels:
    """(H, W, 3 or 4) RGB levels of 16 bits, which Pillow would cut to 8."""
    levels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if levels is None:
        raise ValueError("cannot be decoded; it may be cut off")
    return np.asarray(levels)[..., [2, 1, 0, 3][: levels.shape[2]]]


def _to_uint8(stored: Stored, window: list[float] | None) -> Pixels:
    """The window is for colours and bands, not for transparency."""
    levels = stored.levels
    if not stored.rgb or levels.shape[2] < 4 or levels.dtype == np.uint8:
        return to_uint8(levels, window)
    return np.concatenate([to_uint8(levels[..., :3], window), to_uint8(levels[..., 3:], None)], axis=2)


def webp_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) from the header of a WebP; None for other files."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return None
    match content[12:16]:
        case b"VP8X":  # 24 bits each, less 1
            return int.from_bytes(content[24:27], "little") + 1, int.from_bytes(content[27:30], "little") + 1
        case b"VP8L":  # 14 bits each, less 1, behind a signature byte
            bits = int.from_bytes(content[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":  # 14 bits each and 2 of scaling, behind a frame tag and a start code
            width, height = struct.unpack_from("<HH", content, 26)
            return width & 0x3FFF, height & 0x3FFF
    return None
