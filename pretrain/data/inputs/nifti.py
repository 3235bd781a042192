"""NIfTI volumes: each slice across an axis is an image of 16 bits.

A slice is stored with the first of its two axes along the width; it is not turned to any orientation.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.decode import DEFAULT
from pretrain.data.inputs.groups import group_by_rule
from pretrain.data.inputs.listing import Listing
from pretrain.data.inputs.mixing import BLOCK_BYTES, in_threads, mix, shuffled
from pretrain.data.inputs.optional import load_library
from pretrain.data.inputs.png import encode_png
from pretrain.data.inputs.source import (
    Constant,
    Encoded,
    Options,
    Result,
    Source,
    Summary,
    Unreadable,
    describe,
)
from pretrain.data.inputs.window import Values, Window, extremes, to_16_bits
from pretrain.data.pixels import check_size
from pretrain.data.retry import one_line
from pretrain.errors import InputError

DEFAULT_AXIS = 2
SUBJECT = re.compile(r"(?:^|_)(sub-[0-9A-Za-z]+)")  # in a BIDS file name
GZIP_RATIO = 1032  # deflate packs nothing closer
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes of this machine
UNITS = "unspecified"  # the format has none for intensities


class _Slice(NamedTuple):
    name: str
    source: Source
    values: Values  # (H, W), in the file's units
    window: Window


class _Volume(NamedTuple):
    """A volume as stored; `slope * stored + intercept` are its values."""

    stored: Values  # (X, Y, Z, T)
    slope: float
    intercept: float


@dataclass(frozen=True)
class Volumes:
    """NIfTI files, shuffled; their slices are mixed in blocks."""

    summary: Summary
    sources: Sequence[Source]
    options: Options

    def read(self, numbers: Mapping[str, int]) -> Iterator[Result]:
        """The slices as PNG; one volume at a time is in memory."""
        encode = partial(_encode, numbers=numbers, options=self.options)
        slices = (item for source in self.sources for item in _slices(source, self.options))
        return mix(in_threads(encode, slices), self.options.seed)


def find(listing: Listing, options: Options) -> Volumes:
    """The volumes of NIfTI files; reads their headers.

    Raises:
        InputError: nibabel is missing, there is no such axis, or a name does not match the rule for groups.
    """
    axis = DEFAULT_AXIS if options.axis is None else options.axis
    if axis not in (0, 1, 2):
        raise InputError(f"--axis {axis}: must be 0, 1 or 2")
    load_library("nibabel")
    good: list[Source] = []
    unreadable: list[Unreadable] = []
    total = 0
    for source in listing.files:
        _group(source, options)  # now, not when half of the shards are written
        try:
            shape = _shape(_open(source.path).shape)
            check_size(*_plane(shape, axis), DEFAULT.max_pixels)
        except ValueError as error:
            unreadable.append(Unreadable(source.name, str(error)))
            continue
        good.append(source)
        total += shape[axis] * shape[3]
    labels = frozenset(source.label_name for source in good if source.label_name is not None)
    order = f"volumes shuffled with seed {options.seed}, slices mixed in blocks of {BLOCK_BYTES >> 20} MB"
    summary = Summary(total, order, labels, unreadable=tuple(unreadable), notes=listing.notes())
    return Volumes(summary, shuffled(good, options.seed), options)


def _open(path: Path) -> Any:
    library = load_library("nibabel")
    try:
        image = library.load(path)
    except Exception as error:  # its parsers raise what they happen to meet
        raise ValueError(f"not a NIfTI file that can be read ({one_line(error)})") from error
    if not isinstance(image, library.Nifti1Image):  # Nifti2Image is one too
        raise ValueError(f"holds no volume but a {type(image).__name__}")
    return image


def _shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(X, Y, Z, T) of a volume with two to four axes."""
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if not 2 <= len(shape) <= 4:
        raise ValueError(f"has {len(shape)} axes; images have 2 to 4")
    x, y, z, t = (*shape, 1, 1)[:4]
    if min(x, y, z, t) < 1:
        raise ValueError(f"has no voxels: {x} x {y} x {z} x {t}")
    return x, y, z, t


def _plane(shape: tuple[int, int, int, int], axis: int) -> tuple[int, int]:
    """Width and height of the slices across an axis."""
    width, height = (shape[i] for i in range(3) if i != axis)
    return width, height


def _load(path: Path) -> _Volume:
    data = _open(path).dataobj
    claimed, there = math.prod(data.shape) * data.dtype.itemsize, path.stat().st_size
    if claimed > GZIP_RATIO * there or claimed > MEMORY:
        raise ValueError(f"claims {claimed:,} bytes of voxels in a file of {there:,} bytes")
    try:
        stored = data.get_unscaled()
    except Exception as error:  # as above: cut files, damaged compression
        raise ValueError(f"damaged ({one_line(error)})") from error
    if stored.dtype.kind not in "iuf":
        raise ValueError(f"holds voxels of type {stored.dtype}; only one number per voxel is supported")
    return _Volume(stored.reshape(_shape(stored.shape), order="F"), float(data.slope), float(data.inter))


def _slices(source: Source, options: Options) -> Iterator[_Slice | Unreadable]:
    try:
        volume = _load(source.path)
    except ValueError as error:
        yield Unreadable(source.name, str(error))
        return
    window = Window(*(options.window or _range(volume)), UNITS)
    several = volume.stored.shape[3] > 1
    axis = DEFAULT_AXIS if options.axis is None else options.axis
    slices = np.moveaxis(volume.stored, (axis, 3), (0, 1))  # a view: (slices, T, ...)
    for time in range(slices.shape[1]):
        for number in range(slices.shape[0]):
            values = slices[number, time].T.astype(np.float64) * volume.slope + volume.intercept
            place = f"{time}:{number}" if several else f"{number}"
            yield _Slice(f"{source.name}#{place}", source, values, window)


def _range(volume: _Volume) -> tuple[float, float]:
    ends = sorted(end * volume.slope + volume.intercept for end in extremes(volume.stored) or (0.0, 0.0))
    return ends[0], ends[1]


def _encode(item: _Slice | Unreadable, numbers: Mapping[str, int], options: Options) -> Result:
    if isinstance(item, Unreadable):
        return item
    levels, source = to_16_bits(item.values, item.window), item.source
    if levels.min() == levels.max():
        return Constant(item.name)
    try:
        content = encode_png(levels)
    except ValueError as error:
        return Unreadable(item.name, str(error))
    label = None if source.label_name is None else numbers[source.label_name]
    about = {"window": [item.window.low, item.window.high], "units": item.window.units}
    meta = describe(item.name, source.label_name, label, _group(source, options), **about)
    return Encoded("png", content, label, meta)


def _group(source: Source, options: Options) -> str:
    """By the rule, as listed, by the subject in a BIDS name, or the file's name."""
    if options.group_from:
        return group_by_rule(options.group_from, source.name, source.path)
    subject = SUBJECT.search(source.path.name)
    return source.group or (subject[1] if subject else source.name)
