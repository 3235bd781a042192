"""DICOM files: each frame is an image of 16 bits, or of 8 bits in colour.

Grey values are taken in the modality's units and spread over 16 bits, by one window for all or from the
smallest to the largest value of their series. The patient's identifier becomes a hash.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.inputs.dicom_header import Header, read_header
from pretrain.data.inputs.groups import group_by_rule
from pretrain.data.inputs.listing import Listing
from pretrain.data.inputs.mixing import in_threads, shuffled
from pretrain.data.inputs.optional import load_library
from pretrain.data.inputs.png import encode_png
from pretrain.data.inputs.source import (
    Encoded,
    Options,
    Result,
    Source,
    Summary,
    Unreadable,
    describe,
)
from pretrain.data.inputs.window import Values, Window, extremes, to_16_bits
from pretrain.data.retry import one_line

HASH_BYTES = 8  # two of a million patients share a hash with a probability of 3e-8


class _File(NamedTuple):
    source: Source
    header: Header
    range: tuple[float, float] | None  # of its values; None = in colour, or the window is given


class _Frame(NamedTuple):
    file: _File
    number: int


@dataclass(frozen=True)
class Frames:
    """Frames of DICOM files, shuffled."""

    summary: Summary
    frames: Sequence[_Frame]
    windows: Mapping[str, tuple[float, float]]  # by series
    options: Options

    def read(self, numbers: Mapping[str, int]) -> Iterator[Result]:
        """The frames as PNG."""
        return in_threads(partial(self._read, numbers=numbers), self.frames)

    def _read(self, frame: _Frame, numbers: Mapping[str, int]) -> Result:
        header = frame.file.header
        low, high = self.options.window or self.windows.get(header.series, (0.0, 0.0))
        return _encode(frame, Window(low, high, header.units), numbers, self.options)


def find(listing: Listing, options: Options) -> Frames:
    """The frames of DICOM files; without a window, reads every pixel.

    Raises:
        InputError: pydicom is missing, or a name does not match the rule for groups.
    """
    load_library("pydicom")
    if not options.window:
        print(f"reading {len(listing.files)} files for the values in them", file=sys.stderr, flush=True)
    good: list[_File] = []
    unreadable: list[Unreadable] = []
    for result in in_threads(partial(_inspect, options=options), listing.files):
        if isinstance(result, Unreadable):
            unreadable.append(result)
        else:
            good.append(result)
    frames = [_Frame(file, number) for file in good for number in range(file.header.frames)]
    labels = frozenset(file.source.label_name for file in good if file.source.label_name is not None)
    order = f"order shuffled with seed {options.seed}"
    summary = Summary(len(frames), order, labels, unreadable=tuple(unreadable), notes=listing.notes())
    return Frames(summary, shuffled(frames, options.seed), _series_ranges(good), options)


def _inspect(source: Source, options: Options) -> _File | Unreadable:
    if options.group_from:
        group_by_rule(options.group_from, source.name, source.path)  # now, not when shards are half written
    try:
        header = read_header(source.path)
        return _File(source, header, None if options.window else _range(source.path, header))
    except Exception as error:  # the parser and decoders raise what they happen to meet
        return Unreadable(source.name, one_line(error))


def _range(path: Path, header: Header) -> tuple[float, float] | None:
    """The smallest and the largest value of a file's grey frames, without padding."""
    if header.in_colour:
        return None
    found: list[float] = []
    for number, stored in enumerate(load_library("pydicom.pixels").iter_pixels(path)):
        values = _measured(stored[~header.is_padding(stored)], header, number)
        found += extremes(values) or ()
    return (min(found), max(found)) if found else None


def _series_ranges(files: Sequence[_File]) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for file in files:
        if file.range:
            low, high = ranges.get(file.header.series, file.range)
            ranges[file.header.series] = (min(low, file.range[0]), max(high, file.range[1]))
    return ranges


def _measured(stored: Values, header: Header, frame: int) -> Values:
    """Stored values in the modality's units."""
    slope, intercept = header.rescale[frame]
    return stored if (slope, intercept) == (1, 0) else stored.astype(np.float64) * slope + intercept


def _encode(frame: _Frame, window: Window, numbers: Mapping[str, int], options: Options) -> Result:
    source, header = frame.file.source, frame.file.header
    name = f"{source.name}#{frame.number}" if header.frames > 1 else source.name
    try:
        pixels = load_library("pydicom.pixels").pixel_array(source.path, index=frame.number)
        levels = _colour(source.path, pixels) if header.in_colour else None
        if levels is None:
            levels = to_16_bits(_measured(pixels, header, frame.number), window, header.inverted)
        content = encode_png(levels)
    except Exception as error:  # as above
        return Unreadable(name, one_line(error))
    label = None if source.label_name is None else numbers[source.label_name]
    group = _group(source, header, options)
    about: dict[str, Any] = (
        {} if header.in_colour else {"window": [window.low, window.high], "units": window.units}
    )
    return Encoded("png", content, label, describe(name, source.label_name, label, group, **about))


def _colour(path: Path, pixels: Values) -> Values:
    """(H, W, 3) uint8."""
    if pixels.ndim == 2:  # numbers of a palette
        pixels = load_library("pydicom.pixels").apply_color_lut(
            pixels, load_library("pydicom").dcmread(path, stop_before_pixels=True)
        )
        if pixels.dtype == np.uint16:  # palettes of 16 bits hold screen colours too
            pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"colour of type {pixels.dtype}; only 8 bits are supported")
    return pixels


def _group(source: Source, header: Header, options: Options) -> str | None:
    if options.group_from:
        return group_by_rule(options.group_from, source.name, source.path)
    return source.group or hide(header.patient)


def hide(identifier: str) -> str | None:
    """A short hash that is the same for a patient in every run and does not show the identifier.

    It is no protection against somebody who has a list of identifiers to try.
    """
    if not identifier:
        return None
    return hashlib.blake2b(identifier.encode(), digest_size=HASH_BYTES).hexdigest()
