"""What the header of a DICOM file says about its frames."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.decode import DEFAULT
from pretrain.data.inputs.optional import load_library
from pretrain.data.inputs.window import Values
from pretrain.data.pixels import check_size

GREY = ("MONOCHROME1", "MONOCHROME2")
UNKNOWN = "unspecified"  # units


class Header(NamedTuple):
    """Of one file."""

    frames: int
    series: str  # identifier
    patient: str  # identifier; empty where there is none
    in_colour: bool
    inverted: bool  # low values are bright
    units: str  # of rescaled values
    rescale: tuple[tuple[float, float], ...]  # slope and intercept of each frame
    padding: tuple[int, int] | None  # stored values that fill the area outside the image

    def is_padding(self, stored: Values) -> Values:
        """Where stored values only fill the area outside the image."""
        if self.padding is None:
            return np.zeros(stored.shape, bool)
        low, high = self.padding
        return (stored >= low) & (stored <= high)


def read_header(path: Path) -> Header:
    """The header of a file with pixels.

    Raises:
        ValueError: the file holds no image, one of an unknown kind, or claims more than it can hold.
    """
    dataset = load_library("pydicom").dcmread(path, stop_before_pixels=True)
    if "Rows" not in dataset or "PhotometricInterpretation" not in dataset:
        raise ValueError("a DICOM file without an image")
    if "ModalityLUTSequence" in dataset:
        raise ValueError("a table of values (Modality LUT) instead of slope and intercept is not supported")
    frames, there = int(dataset.get("NumberOfFrames") or 1), path.stat().st_size
    if not 1 <= frames <= there:
        raise ValueError(f"claims {frames:,} frames in a file of {there:,} bytes")
    check_size(int(dataset.Columns), int(dataset.Rows), DEFAULT.max_pixels)
    kind = str(dataset.PhotometricInterpretation)
    return Header(
        frames=frames,
        series=str(dataset.get("SeriesInstanceUID") or path),
        patient=str(dataset.get("PatientID") or "").strip(),
        in_colour=kind not in GREY,
        inverted=kind == "MONOCHROME1",
        units=_units(dataset),
        rescale=tuple(_rescale(dataset, number) for number in range(frames)),
        padding=_padding(dataset),
    )


def _units(dataset: Any) -> str:
    """Of rescaled values: as stated, or what the standard says about CT."""
    stated = _find(dataset, 0, "RescaleType") or dataset.get("Units")
    return str(stated or ("HU" if dataset.get("Modality") == "CT" else UNKNOWN))


def _rescale(dataset: Any, frame: int) -> tuple[float, float]:
    slope, intercept = (_find(dataset, frame, name) for name in ("RescaleSlope", "RescaleIntercept"))
    return (1.0 if slope is None else float(slope)), float(intercept or 0)


def _find(dataset: Any, frame: int, name: str) -> Any:
    """A value of one frame: newer files keep it in lists per frame or shared by the frames."""
    for part in _parts(dataset, frame):
        if part.get(name) is not None:
            return part.get(name)
    return None


def _parts(dataset: Any, frame: int) -> Iterator[Any]:
    frames, shared = (dataset.get(f"{kind}FunctionalGroupsSequence") or [] for kind in ("PerFrame", "Shared"))
    for group in [*frames[frame : frame + 1], *shared[:1]]:
        yield from group.get("PixelValueTransformationSequence") or []
    yield dataset


def _padding(dataset: Any) -> tuple[int, int] | None:
    one = dataset.get("PixelPaddingValue")
    if one is None:
        return None
    other = dataset.get("PixelPaddingRangeLimit")
    other = one if other is None else other
    return min(one, other), max(one, other)
