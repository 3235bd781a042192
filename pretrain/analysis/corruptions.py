"""Corrupted copies of images in the manner of CIFAR-10-C, made on the fly.

Kinds and constants are those that Hendrycks and Dietterich (Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations, 2019) chose for images of 32 pixels. They are applied to larger images
as they are, in pixels where they are lengths: blurs are milder there than those of ImageNet-C. The copies are
not those of the published files: draws differ, levels are rounded instead of truncated, and `snow_like` only
resembles `snow`.
"""

import io
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np
from PIL import Image

from pretrain.analysis.blurs import Floats, defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from pretrain.analysis.weather import fog, snow_like
from pretrain.data.pixels import Pixels
from pretrain.errors import InputError
from pretrain.seeding import numpy_stream

CorruptionName = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "gaussian_blur",
    "defocus_blur",
    "motion_blur",
    "zoom_blur",
    "glass_blur",
    "brightness",
    "contrast",
    "saturate",
    "jpeg_compression",
    "pixelate",
    "fog",
    "snow_like",
]
NAMES: tuple[CorruptionName, ...] = get_args(CorruptionName)
SEVERITIES = (1, 2, 3, 4, 5)

# one entry a severity; of levels from 0 to 1
GAUSSIAN_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation
SHOT_NOISE = (500, 250, 100, 75, 50)  # photons of a white pixel
IMPULSE_NOISE = (0.01, 0.02, 0.03, 0.05, 0.07)  # share of black and white values together
SPECKLE_NOISE = (0.06, 0.10, 0.12, 0.16, 0.20)  # standard deviation, of a white pixel
GAUSSIAN_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # standard deviation, pixels
DEFOCUS_BLUR = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))  # radius, alias
MOTION_BLUR = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))  # radius, standard deviation
MOTION_ANGLE = (-45.0, 45.0)  # degrees, of all severities
ZOOM_BLUR = (1.06, 1.11, 1.16, 1.21, 1.26)  # largest factor
GLASS_BLUR = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))  # standard deviation, iterations
BRIGHTNESS = (0.05, 0.10, 0.15, 0.20, 0.30)  # added to the value of HSV
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # factor of the distance to the channel's mean
SATURATE = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))  # saturation's factor, shift
JPEG_COMPRESSION = (80, 65, 58, 50, 40)  # quality
PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)  # share of the pixels of a side that are left
FOG = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))  # amplitude, decay
SNOW_LIKE = (  # threshold, radius, standard deviation, whitening
    (2.0, 6, 1.5, 0.05),
    (1.6, 6, 1.5, 0.10),
    (1.4, 6, 2.0, 0.12),
    (1.2, 8, 2.5, 0.15),
    (1.0, 9, 3.0, 0.20),
)
COLOUR = ("saturate",)  # is defined for RGB only
GREY_OR_COLOUR = ("brightness", "jpeg_compression", "snow_like")  # for 1 channel and RGB; all others for any


@dataclass(frozen=True)
class Corruption:
    """One kind at one severity from 1 to 5; as text `name:severity`.

    Raises:
        InputError: there is no such kind or severity.
    """

    name: CorruptionName
    severity: int

    def __post_init__(self) -> None:
        """Check name and severity."""
        if self.name not in NAMES:
            raise InputError(f"corruption {self.name!r}: must be one of {', '.join(NAMES)}")
        if self.severity not in SEVERITIES:
            raise InputError(f"corruption {self.name}: severity {self.severity!r} must be 1, 2, 3, 4 or 5")

    def __str__(self) -> str:
        """As `parse_corruption` reads it."""
        return f"{self.name}:{self.severity}"


def parse_corruption(text: str) -> Corruption:
    """`name:severity` of a command line, such as contrast:5.

    Raises:
        InputError: it is not of that form, or there is no such kind or severity.
    """
    name, colon, severity = text.partition(":")
    if not colon or not severity.isdecimal():
        names = ", ".join(NAMES)
        raise InputError(f"corruption {text!r}: must be NAME:SEVERITY, as contrast:5, with a name of {names}")
    return Corruption(name, int(severity))  # type: ignore[arg-type]  # the class checks it


def corrupt(pixels: Pixels, corruption: Corruption, key: int | str, seed: int = 0) -> Pixels:
    """A corrupted copy of one image: (H, W, C) uint8 in, the same shape out.

    All draws are a function of (seed, kind, severity, key): neither order nor batch changes them.

    Args:
        pixels: C is 3 (RGB); 1 (grey) for all kinds but saturate; any number for noise, blurs, contrast,
            pixelate and fog.
        corruption: kind and severity.
        key: of the image: its position in the data set, or its name.
        seed: another one gives other draws.

    Raises:
        InputError: the pixels are not such an image, or the kind is not defined for their channels.
    """
    _check(pixels, corruption.name)
    rng = numpy_stream(seed, "corruption", corruption.name, corruption.severity, key)
    return _levels(_corrupted(_shares(pixels), corruption.name, corruption.severity - 1, rng))


def _corrupted(image: Floats, name: CorruptionName, level: int, rng: np.random.Generator) -> Floats:
    """One kind; `level` counts from 0. The result is not yet clipped."""
    match name:
        case "gaussian_noise" | "shot_noise" | "impulse_noise" | "speckle_noise":
            return _noisy(image, name, level, rng)
        case "gaussian_blur":
            return gaussian_blur(image, GAUSSIAN_BLUR[level])
        case "defocus_blur":
            return defocus_blur(image, *DEFOCUS_BLUR[level])
        case "motion_blur":
            return motion_blur(image, *MOTION_BLUR[level], rng.uniform(*MOTION_ANGLE))
        case "zoom_blur":
            return zoom_blur(image, ZOOM_BLUR[level])
        case "glass_blur":
            return glass_blur(image, *GLASS_BLUR[level], rng)
        case "brightness":
            return _brightness(image, BRIGHTNESS[level])
        case "contrast":
            mean = image.mean((0, 1), keepdims=True)
            return (image - mean) * CONTRAST[level] + mean
        case "saturate":
            return _hsv(image, 1, *SATURATE[level])
        case "jpeg_compression":
            return _jpeg(image, JPEG_COMPRESSION[level])
        case "pixelate":
            return _pixelate(image, PIXELATE[level])
        case "fog":
            return fog(image, *FOG[level], rng)
        case "snow_like":
            return snow_like(image, *SNOW_LIKE[level], rng)


def _noisy(
    image: Floats,
    name: Literal["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"],
    level: int,
    rng: np.random.Generator,
) -> Floats:
    """Noise that each value, of each channel, draws for itself."""
    match name:
        case "gaussian_noise":
            return image + GAUSSIAN_NOISE[level] * rng.standard_normal(image.shape, np.float32)
        case "shot_noise":
            return (rng.poisson(image * SHOT_NOISE[level]) / SHOT_NOISE[level]).astype(np.float32)
        case "impulse_noise":
            return _salt_and_pepper(image, IMPULSE_NOISE[level], rng)
        case "speckle_noise":
            return image + image * SPECKLE_NOISE[level] * rng.standard_normal(image.shape, np.float32)


def _salt_and_pepper(image: Floats, share: float, rng: np.random.Generator) -> Floats:
    """A share of the values replaced, half by 0 and half by 1."""
    draws = rng.random(image.shape)
    return np.where(draws < share / 2, 0, np.where(draws < share, 1, image)).astype(np.float32)


def _brightness(image: Floats, shift: float) -> Floats:
    """The value of HSV raised; a grey image is its own value."""
    return image + shift if image.shape[2] == 1 else _hsv(image, 2, 1, shift)


def _hsv(image: Floats, channel: int, factor: float, shift: float) -> Floats:
    """Saturation (1) or value (2) times a factor plus a shift, clipped; grey has the hue of red."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = np.clip(hsv[..., channel] * factor + shift, 0, 1)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.float32)


def _jpeg(image: Floats, quality: int) -> Floats:
    """Stored by Pillow as JPEG (colour at half the resolution) and read back."""
    levels, file = _levels(image), io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).save(file, "JPEG", quality=quality)
    return _shares(np.array(Image.open(file))).reshape(image.shape)


def _pixelate(image: Floats, share: float) -> Floats:
    """Made smaller and then larger again by Pillow with a box filter, each channel for itself."""
    height, width, _ = image.shape
    small = max(1, int(width * share)), max(1, int(height * share))
    channels = [Image.fromarray(levels) for levels in np.moveaxis(_levels(image), 2, 0)]
    coarse = [channel.resize(small, Image.Resampling.BOX) for channel in channels]
    back = [np.asarray(channel.resize((width, height), Image.Resampling.BOX)) for channel in coarse]
    return _shares(np.stack(back, axis=2))


def _shares(pixels: Pixels) -> Floats:
    """Levels as shares of 255."""
    return np.asarray(np.divide(pixels, 255, dtype=np.float32))


def _levels(image: Floats) -> Pixels:
    """Clipped to 0 to 1, as rounded uint8."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _check(pixels: Pixels, name: CorruptionName) -> None:
    """Refuse what is no (H, W, C) uint8 image, and channels that the kind is not defined for."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.size == 0:
        raise InputError(
            f"corruption {name}: needs (H, W, C) uint8 pixels, not {pixels.shape} {pixels.dtype}"
        )
    channels = pixels.shape[2]
    if channels != 3 and (name in COLOUR or (name in GREY_OR_COLOUR and channels != 1)):
        wanted = "3 channels" if name in COLOUR else "1 or 3 channels"
        raise InputError(f"corruption {name}: needs {wanted}, the image has {channels}")
