"""How pixels become a model's input: the command line's word, else what the weights say of their training."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.config.schema import DecodeConfig
from pretrain.data.labelled import Change, labelled_batches
from pretrain.errors import InputError
from pretrain.export.weights import Weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB / 255: those of the released models
KEY = "pixels"  # of what weights say about their origin


@dataclass(frozen=True)
class Scaling:
    """Levels to 0..255 through a window, divided by 255, then standardised by channel."""

    mean: Sequence[float] = MEAN  # per channel, of pixel / 255
    std: Sequence[float] = STD
    window: Sequence[float] | None = None  # low and high level of images of more than 8 bits; None: all 16

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.mean)

    @property
    def decoding(self) -> DecodeConfig:
        """How files become pixels."""
        return DecodeConfig(window=list(self.window) if self.window else None)

    def normalised(self, pixels: Tensor) -> Tensor:
        """(..., C, H, W) levels to float32."""
        return (pixels.float() / 255 - self._columns(self.mean)) / self._columns(self.std)

    def shown(self, images: Tensor) -> Tensor:
        """Normalised (..., C, H, W) to RGB (..., 3, H, W) from 0 to 1; other channels than 3: their mean."""
        values = images.float().cpu() * self._columns(self.std) + self._columns(self.mean)
        grey = values if self.channels == 3 else values.mean(dim=-3, keepdim=True)
        return grey.expand(*grey.shape[:-3], 3, *grey.shape[-2:]).clamp(0, 1)

    def _columns(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values).view(-1, 1, 1)

    def labelled(
        self,
        patterns: Sequence[str],
        key_name: str,
        resize: int,
        crop: int,
        batch_size: int,
        change: Change | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Labelled images of shards; arguments, what comes and errors as for `labelled_batches`."""
        return labelled_batches(
            patterns,
            key_name,
            resize,
            crop,
            self.mean,
            self.std,
            batch_size,
            self.channels,
            self.decoding,
            change,
        )

    def document(self) -> dict[str, Any]:
        """Plain values, as weights carry them."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "window": list(self.window) if self.window else None,
        }


def add_scaling(parser: argparse.ArgumentParser) -> None:
    """Add the options that `scaling_for` reads."""
    add, default = parser.add_argument, "default: what the weights say, else ImageNet's"
    add("--mean", type=float, nargs="+", metavar="M", help=f"per channel, of pixel / 255; {default}")
    add("--std", type=float, nargs="+", metavar="S", help="likewise")
    text = "of 16 bits that become 0 and 255 (data.decode.window)"
    add("--levels", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)


def scaling_for(options: argparse.Namespace, weights: Weights) -> Scaling:
    """That of a model: each of --mean, --std, --levels, else what its weights say, else ImageNet's for RGB.

    Raises:
        InputError: the numbers do not fit the model's channels, or there are none for them.
    """
    said = _said(weights)
    given = {"mean": options.mean, "std": options.std, "window": options.levels}
    given = {name: said.get(name) if value is None else value for name, value in given.items()}
    mean, std = (
        _channels(name, given[name], default, weights) for name, default in (("mean", MEAN), ("std", STD))
    )
    _check(mean, std, given["window"])
    return Scaling(mean, std, given["window"])


def _channels(
    name: str, given: Sequence[float] | None, default: Sequence[float], weights: Weights
) -> Sequence[float]:
    """Numbers of all channels of a model."""
    channels = weights.model.in_channels
    numbers = f"{channels} number{'s' if channels > 1 else ''}"
    if given is None and channels != len(default):
        raise InputError(
            f"--{name}: {weights.path} takes {channels} channels and does not say how they are scaled; "
            f"give {numbers}, as in its training (data.{name})"
        )
    values = default if given is None else given
    if len(values) != channels:
        raise InputError(f"--{name}: {weights.path} takes {channels} channels; give {numbers}")
    return values


def _said(weights: Weights) -> Mapping[str, Any]:
    said = weights.about.get(KEY, {})
    if not isinstance(said, dict) or not all(value is None or _is_list(value) for value in said.values()):
        raise InputError(f"{weights.path}: what it says of its pixels cannot be read; give --mean and --std")
    return said


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, int | float) for one in value)


def _check(mean: Sequence[float], std: Sequence[float], window: Sequence[float] | None) -> None:
    if not all(map(math.isfinite, mean)):
        raise InputError("--mean: must be finite numbers")
    if not all(math.isfinite(value) and value > 0 for value in std):
        raise InputError("--std: must be finite numbers above 0")
    if window is not None and not (len(window) == 2 and -math.inf < window[0] < window[1] < math.inf):
        raise InputError(f"--levels: {' '.join(map(str, window))} must be a lower and a higher level")
