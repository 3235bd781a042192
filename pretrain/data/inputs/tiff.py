"""The pages of a TIFF, each as an image file of its own, without loss.

Pillow reads most of them; tifffile, which is optional, those that Pillow would cut down (16 bits in colour,
more than four channels).
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pretrain.data.decode import DEFAULT
from pretrain.data.formats import COLOUR_BANDS
from pretrain.data.inputs.optional import load_library
from pretrain.data.inputs.png import encode_png
from pretrain.data.pixels import check_size
from pretrain.data.tiff import STARTS

SUBFILE_TYPE, BITS, SAMPLES, EXTRA_SAMPLES = 254, 258, 277, 338  # tags
REDUCED = 1  # in SUBFILE_TYPE: a smaller version of another page
PREMULTIPLIED = 1  # in EXTRA_SAMPLES: Pillow would divide the colours by alpha
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
REFUSED = "pixels are {}, which have no fixed range of values; convert them to 8 or 16 bits"


def full_pages(path: Path) -> list[int]:
    """Numbers of the pages that are not smaller versions of another one; none where the file is not a TIFF.

    Raises:
        ValueError: there are several, of values that cannot be packed.
        InputError: there are several, and tifffile is missing.
    """
    with path.open("rb") as file:
        if file.read(4) not in STARTS:
            return []
    try:
        with Image.open(path, formats=["TIFF"]) as image:
            pages = [page for page in range(getattr(image, "n_frames", 1)) if not _is_reduced(image, page)]
            suits = _suits_pillow(image)
    except Exception:  # Pillow's plug-ins raise what their parsers happen to meet
        return _pages_by_tifffile(path)
    return pages if suits or len(pages) < 2 else _pages_by_tifffile(path)


def _is_reduced(image: Image.Image, page: int) -> bool:
    image.seek(page)
    return bool(_tag(image, SUBFILE_TYPE, 0) & REDUCED)


def _suits_pillow(image: Image.Image) -> bool:
    """Whether Pillow would give the current page's values as they are."""
    bits = np.max(_tag(image, BITS, 1))
    return bool(
        _tag(image, SAMPLES, 1) == len(image.getbands())
        and PREMULTIPLIED not in np.atleast_1d(_tag(image, EXTRA_SAMPLES, 0))
        and (bits <= 8 or image.mode.startswith("I;16"))
    )


def _tag(image: Image.Image, number: int, default: int) -> Any:
    return getattr(image, "tag_v2", {}).get(number, default)


def _pages_by_tifffile(path: Path) -> list[int]:
    tifffile = load_library("tifffile")
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [number for number, page in enumerate(tiff.pages) if not page.subfiletype & REDUCED]
            dtype = tiff.pages[pages[0]].dtype
    except Exception:  # as above; reading it as one image will say what is wrong
        return []
    if len(pages) > 1:
        _check_type(dtype)
    return pages


def read_page(path: Path, page: int) -> tuple[str, bytes]:
    """One page as (extension, bytes): a PNG, or a TIFF of one page where PNG cannot hold it.

    Raises:
        ValueError: it cannot be read, or holds values other than 8 and 16 bits; says why.
    """
    try:
        with Image.open(path, formats=["TIFF"]) as image:
            image.seek(page)
            check_size(*image.size, DEFAULT.max_pixels)
            if _suits_pillow(image):
                return _save(image)
    except (UnidentifiedImageError, SyntaxError):  # a kind of pixel that Pillow does not know
        pass
    except Exception as error:  # as above
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return _by_tifffile(path, page)


def _save(image: Image.Image) -> tuple[str, bytes]:
    if image.mode.startswith("I;16"):
        return "png", encode_png(np.asarray(image).astype(np.uint16))
    file = io.BytesIO()
    if image.mode in PNG_MODES:
        image.save(file, "PNG")
        return "png", file.getvalue()
    image.save(file, "TIFF", compression="tiff_deflate")
    return "tif", file.getvalue()


def _by_tifffile(path: Path, page: int) -> tuple[str, bytes]:
    tifffile = load_library("tifffile")
    try:
        with tifffile.TiffFile(path) as tiff:
            found = tiff.pages[page]
            check_size(math.prod(found.shape), 1, COLOUR_BANDS * DEFAULT.max_pixels, "levels")
            pixels, axes, colour = found.asarray(), found.axes, found.photometric.name == "RGB"
    except Exception as error:  # its parsers raise what they happen to meet
        raise ValueError(f"{type(error).__name__}: {error}") from error
    _check_type(pixels.dtype)
    if axes == "SYX":  # channels stored one after the other
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 2 or (colour and pixels.shape[2] in (3, 4)):
        return "png", encode_png(pixels)
    return "tif", _one_page(tifffile, np.ascontiguousarray(pixels))


def _check_type(dtype: Any) -> None:
    if dtype not in (np.uint8, np.uint16):
        raise ValueError(REFUSED.format(dtype))


def _one_page(tifffile: Any, pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(
        file, pixels, photometric="minisblack", planarconfig="contig", compression="zlib", metadata=None
    )
    return file.getvalue()
