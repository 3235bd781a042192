"""Measured values, such as Hounsfield units, to 16 bits: what becomes black and what white is stated."""

from typing import Any, NamedTuple

import numpy as np

FULL = 65_535  # the largest value of 16 bits

Values = np.ndarray[Any, Any]
Levels = np.ndarray[Any, np.dtype[np.uint16]]


class Window(NamedTuple):
    """The values that become 0 and 65535; those between are spread evenly, those outside are clipped."""

    low: float
    high: float
    units: str


def to_16_bits(values: Values, window: Window, inverted: bool = False) -> Levels:
    """Values of any type and shape as uint16; what is not a number becomes 0.

    Integers that span at most 65,536 values keep all their differences.
    """
    span = window.high - window.low
    scaled = (values.astype(np.float64) - window.low) * (FULL / span if span else 0.0)
    levels = np.rint(np.clip(np.nan_to_num(scaled, nan=0.0), 0, FULL)).astype(np.uint16)
    return FULL - levels if inverted else levels


def extremes(values: Values) -> tuple[float, float] | None:
    """The smallest and the largest finite value; None where there is none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else None
