"""TIFF files: what their tags say, and bands that Pillow does not read, such as multispectral images."""

import importlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pretrain.data.exif import AS_STORED
from pretrain.data.pixels import Levels

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
UINT, RGB, COLOURS = 1, 2, (2, 5, 6, 8)  # sample format; photometric: RGB, and CMYK, YCbCr, Lab
PLANES = 2  # planar configuration
ALPHAS = ((1,), (2,))  # kinds of extra samples that are transparency


@dataclass(frozen=True)
class Tags:
    """What matters of a TIFF's first directory."""

    width: int
    height: int
    samples: int  # a pixel
    bits: int  # a sample, the largest
    sample_format: int
    photometric: int
    extra: tuple[int, ...]  # kinds of the samples beyond the colours
    planes: bool  # each band by itself
    orientation: int

    @property
    def rgb(self) -> bool:
        """Colours, perhaps with transparency."""
        has_alpha = self.samples == 4 and self.extra[:1] in ((), *ALPHAS)
        return self.photometric == RGB and (self.samples == 3 or has_alpha)

    @property
    def colour_of_16_bits(self) -> bool:
        """RGB that OpenCV reads with all its bits; it takes planes for pixels without a word."""
        return self.rgb and self.bits == 16 and self.sample_format == UINT and not self.planes

    @property
    def read_by_pillow(self) -> bool:
        """One band of any depth, or colours, or grey with transparency, of 8 bits."""
        if self.samples == 1:
            return True
        grey = self.samples == 2 and self.photometric in (0, 1) and self.extra[:1] in ALPHAS
        colours = self.photometric in COLOURS and (self.photometric != RGB or self.rgb)
        return self.bits <= 8 and (grey or colours)


def read_tags(content: bytes) -> Tags | None:
    """The tags of the first image in a TIFF; None for other files.

    Raises:
        Exception: whatever Pillow meets in a damaged file.
    """
    if content[:4] not in STARTS:
        return None
    directory = ImageFileDirectory_v2(content[: 16 if content[2:4] in (b"+\0", b"\0+") else 8])
    file = io.BytesIO(content)
    file.seek(directory.next)
    directory.load(file)
    return _tags({TiffTags.lookup(number).name: directory[number] for number in directory})


def _tags(found: dict[str, Any]) -> Tags:
    return Tags(
        width=int(found["ImageWidth"]),
        height=int(found["ImageLength"]),
        samples=int(found.get("SamplesPerPixel", 1)),
        bits=max(_numbers(found.get("BitsPerSample", 1))),
        sample_format=max(_numbers(found.get("SampleFormat", UINT))),
        photometric=int(found.get("PhotometricInterpretation", 1)),
        extra=_numbers(found.get("ExtraSamples", ())),
        planes=found.get("PlanarConfiguration", 1) == PLANES,
        orientation=int(found.get("Orientation", AS_STORED)),
    )


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple) else (int(value),)


def read_bands(content: bytes, tags: Tags) -> Levels:
    """(H, W, n) levels of the first image of a TIFF.

    Raises:
        ValueError: it is not a flat image, or tifffile is not installed.
        Exception: whatever tifffile meets in a damaged file.
    """
    try:
        tifffile = importlib.import_module("tifffile")  # optional: few data sets need it
    except ImportError as error:
        kind = f"{tags.samples} channels of {tags.bits} bits"
        raise ValueError(f"a TIFF of {kind} needs tifffile; pip install 'pretrain[tiff]'") from error
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages[0]
        bands, axes = page.asarray(), page.axes
    if axes not in ("SYX", "YXS"):
        raise ValueError(f"a TIFF with axes {axes} is not one flat image")
    levels = np.moveaxis(bands, 0, -1) if bands.ndim == 3 and axes == "SYX" else np.asarray(bands)
    if levels.shape != (tags.height, tags.width, tags.samples):  # tifffile takes missing pixels lightly
        raise ValueError("cannot be decoded; it may be cut off")
    return levels
