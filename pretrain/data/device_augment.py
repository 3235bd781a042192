"""The augmentation after resizing, for a whole batch on the device: the operations of `colour.py` in torch.

Values are whole levels in float32, and sums of them stay below 2^24, so all but saturation and hue give the
very levels of the CPU path on any device, and these nearly so. Which crops an operation changes is decided on
the CPU: nothing waits for the device, and no shape depends on it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pretrain.data.colour import BLUR_KERNEL, HUE_STEPS, TAP_UNITS, TRUNCATE
from pretrain.data.draw_params import (
    AMOUNTS,
    FLIP,
    GRAYSCALE,
    KINDS,
    SLOTS,
    SOLARIZE,
    TAPS,
    Rows,
)
from pretrain.data.draws import ADJUSTMENTS

CHUNK_BYTES = 2**26  # of float32 pixels that are worked on at a time; temporary memory is a few times this
LUMA, LUMA_UNITS = (9798, 19235, 3735), 2**15  # ITU-R 601 weights as OpenCV rounds them
SATURATION_EPSILON = 1e-3  # as in `colour.adjust_hue`

Places = np.ndarray[Any, np.dtype[np.int64]]  # (m,) of the batch
Operation = Callable[[Tensor, Tensor], Tensor]  # (m, C, S, S) float32 and (m, P) float32 to (m, C, S, S)


class _Step(NamedTuple):
    """An operation and the rows of the batch that it changes."""

    operation: Operation
    rows: Places


def augment_on_device(crops: Tensor, params: Rows | Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Flip, jitter, grey, blur and solarize resized crops as their draws say.

    Args:
        crops: (n, C, S, S) uint8, on any device; left as they are.
        params: (n, P) float32 on the CPU, from `encode_draws`.
        chunk_bytes: of float32 pixels worked on at a time; does not change the result.

    Returns:
        (n, C, S, S) uint8 on the device of the crops.
    """
    table = np.asarray(params)
    steps = [step for step in _plan(table) if len(step.rows)]
    out = crops.clone()
    if not steps:
        return out
    values = _send(torch.from_numpy(table), crops.device)
    places = _send(torch.from_numpy(np.concatenate([step.rows for step in steps])), crops.device)
    chunk, end = max(1, chunk_bytes // (4 * crops[0].numel())), 0
    for step in steps:
        start, end = end, end + len(step.rows)
        for first in range(start, end, chunk):
            rows = places[first : min(first + chunk, end)]
            changed = step.operation(out.index_select(0, rows).float(), values.index_select(0, rows))
            out.index_copy_(0, rows, changed.to(torch.uint8))
    return out


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _plan(table: Rows) -> Iterator[_Step]:
    """The operations in their order; within a place of the jitter they change different rows."""
    yield _Step(_flip, np.flatnonzero(table[:, FLIP]))
    for slot in range(SLOTS):
        for kind, name in enumerate(ADJUSTMENTS):
            yield _Step(_adjustment(name, slot), np.flatnonzero(table[:, KINDS][:, slot] == kind))
    yield _Step(_to_gray, np.flatnonzero(table[:, GRAYSCALE]))
    yield _Step(_blur, np.flatnonzero(table[:, TAPS].any(1)))
    yield _Step(_solarize, np.flatnonzero(table[:, SOLARIZE]))


def _adjustment(name: str, slot: int) -> Operation:
    adjust = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}[name]
    column = AMOUNTS.start + slot
    return lambda crops, values: adjust(crops, values[:, column].view(-1, 1, 1, 1))


def _flip(crops: Tensor, _: Tensor) -> Tensor:
    return crops.flip(-1)


def _brightness(crops: Tensor, factor: Tensor) -> Tensor:
    return (crops * factor).clamp(0, 255)  # the conversion to uint8 truncates, as Pillow does


def _contrast(crops: Tensor, factor: Tensor) -> Tensor:
    gray = _luma(crops) if crops.shape[1] == 3 else crops
    # In whole numbers: the sum is exact at any size of crop. Twice the mean plus one, halved, is rounded.
    total, count = gray.flatten(1).long().sum(1), gray[0].numel()
    level = ((2 * total + count) // (2 * count)).float().view(-1, 1, 1, 1)
    return ((crops - level) * factor + level).clamp(0, 255)


def _saturation(crops: Tensor, factor: Tensor) -> Tensor:
    blend = _luma(crops) * (1 - factor) + crops * factor
    return (blend + TRUNCATE).round().clamp(0, 255)


def _hue(crops: Tensor, steps: Tensor) -> Tensor:
    """As `colour.adjust_hue`: hue and saturation in truncated steps, the hue's wrapping at 256."""
    red, green, blue = crops[:, :1], crops[:, 1:2], crops[:, 2:]
    value, least = crops.amax(1, keepdim=True), crops.amin(1, keepdim=True)
    spread = value - least
    # In degrees and in this order, as OpenCV: truncation makes whole steps of differences in the last bit.
    share: Tensor = 60 / spread.clamp(min=1)
    degrees = torch.where(value == green, (blue - red) * share + 120, (red - green) * share + 240)
    degrees = torch.where(value == red, (green - blue) * share, degrees)
    degrees = torch.where(degrees < 0, degrees + 360, degrees)
    hue = ((degrees * (HUE_STEPS / 360)).floor() + steps).remainder(256)
    saturation = (spread / value.clamp(min=1) * 255 + SATURATION_EPSILON).floor() / 255
    return _from_hsv(hue * (6 / HUE_STEPS), saturation, value)


def _from_hsv(sector: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """(m, 1, S, S) each, hue in sixths of the circle, to (m, 3, S, S) RGB levels."""
    places = torch.cat([(sector + corner).remainder(6) for corner in (5, 3, 1)], dim=1)
    shares = torch.minimum(places, 4 - places).clamp(0, 1)
    return (value - value * saturation * shares).round()


def _to_gray(crops: Tensor, _: Tensor) -> Tensor:
    return _luma(crops).expand_as(crops)


def _luma(crops: Tensor) -> Tensor:
    """(m, 3, S, S) to (m, 1, S, S), rounded as OpenCV does; all products are whole and exact."""
    red, green, blue = crops[:, :1], crops[:, 1:2], crops[:, 2:]
    total = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    return torch.floor((total + LUMA_UNITS // 2) / LUMA_UNITS)


def _blur(crops: Tensor, values: Tensor) -> Tensor:
    taps = values[:, TAPS].view(-1, BLUR_KERNEL // 2 + 1, 1, 1, 1)
    blurred = _blur_rows(_blur_rows(crops, taps).transpose(2, 3), taps).transpose(2, 3)
    return (blurred / TAP_UNITS**2 + 0.5).floor()


def _blur_rows(crops: Tensor, taps: Tensor) -> Tensor:
    """Weighted sums along the last axis, mirrored at the edge; not a convolution, which may use TF32."""
    reach, size = BLUR_KERNEL // 2, crops.shape[-1]
    padded = pad(crops, (reach, reach, 0, 0), mode="reflect")
    total = padded[..., reach : reach + size] * taps[:, reach]
    for i in range(reach):
        opposite = 2 * reach - i
        total += (padded[..., i : i + size] + padded[..., opposite : opposite + size]) * taps[:, i]
    return total


def _solarize(crops: Tensor, _: Tensor) -> Tensor:
    return torch.where(crops < 128, crops, 255 - crops)
