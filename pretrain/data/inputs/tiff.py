"""The pages of a TIFF, each as an image file of its own, without loss.

Pillow reads most of them; tifffile, which is optional, those that Pillow would cut down (16 bits in colour,
more than four channels).
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pretrain.data.inputs.optional import load_library
from pretrain.data.inputs.png import encode_png

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SUBFILE_TYPE, SAMPLES_PER_PIXEL = 254, 277  # tags
REDUCED = 1  # in SUBFILE_TYPE: a smaller version of another page
PILLOW_GIVES_UP = (UnidentifiedImageError, SyntaxError)  # before OSError, which the first one is
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
REFUSED = "pixels are {}, which have no fixed range of values; convert them to 8 or 16 bits"


def full_pages(path: Path) -> list[int]:
    """Numbers of the pages that are not smaller versions of another one; none where the file is not a TIFF.

    Raises:
        ValueError: there are several, of values that cannot be packed.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) not in TIFF_STARTS:
                return []
        return _pages_by_pillow(path)
    except PILLOW_GIVES_UP:
        return _pages_by_tifffile(path)
    except OSError:
        return []  # reading it as one image will say what is wrong


def _pages_by_pillow(path: Path) -> list[int]:
    pages = []
    with Image.open(path) as image:
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            if not _tag(image, SUBFILE_TYPE, 0) & REDUCED:
                pages.append(page)
        if len(pages) > 1 and image.mode in ("I", "F"):
            raise ValueError(REFUSED.format(f"of mode {image.mode}"))
    return pages


def _pages_by_tifffile(path: Path) -> list[int]:
    tifffile = load_library("tifffile")
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [number for number, page in enumerate(tiff.pages) if not page.subfiletype & REDUCED]
            dtype = tiff.pages[pages[0]].dtype
    except Exception:  # its parsers raise what they happen to meet; reading it as one image will say more
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
        with Image.open(path) as image:
            image.seek(page)
            if _tag(image, SAMPLES_PER_PIXEL, 1) == len(image.getbands()):  # else Pillow drops channels
                return _save(image)
    except PILLOW_GIVES_UP:
        pass
    except (OSError, EOFError) as error:
        raise ValueError(f"page {page}: {error}") from error
    return _by_tifffile(path, page)


def _tag(image: Image.Image, number: int, default: int) -> int:
    return int(getattr(image, "tag_v2", {}).get(number, default))


def _save(image: Image.Image) -> tuple[str, bytes]:
    if image.mode in ("I", "F"):
        raise ValueError(REFUSED.format(f"of mode {image.mode}"))
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
            pixels, axes, colour = found.asarray(), found.axes, found.photometric.name == "RGB"
    except Exception as error:  # its parsers raise what they happen to meet
        raise ValueError(f"page {page}: {error}") from error
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
