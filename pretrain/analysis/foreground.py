"""Foreground and background from the first main component of patch tokens, as in figure 1 of DINOv2."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pretrain.analysis.maps import PatchPca
from pretrain.errors import InputError

SMALLEST_GRID = 3  # patches at a side; fewer have no inner ones


@dataclass(frozen=True)
class Foreground:
    """A direction in token space; patches above the mean along it are foreground.

    DINOv2 keeps the patches with a positive first component. The sign of a component is arbitrary: here it
    is the one by which patches at the border of the images lie lower than the others, because objects are
    rarely cut off at all sides.
    """

    mean: Tensor  # (D,)
    direction: Tensor  # (D,) of length 1

    @classmethod
    def fit(cls, tokens: Tensor) -> Self:
        """The first main component of all patch tokens (n, h, w, D): one for a set of images.

        Raises:
            InputError: tokens that are not finite, or a grid without inner patches.
        """
        rows = tokens.detach().double().cpu()
        if min(rows.shape[1:3]) < SMALLEST_GRID or not rows.isfinite().all():
            raise InputError(
                f"foreground needs finite tokens of at least {SMALLEST_GRID} x {SMALLEST_GRID} "
                f"patches, got {tuple(rows.shape)}; take larger images (--size)"
            )
        mean = rows.flatten(0, 2).mean(0)
        centred = (rows - mean).flatten(0, 2)
        direction = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
        values = (rows - mean) @ direction
        inner = torch.zeros(values.shape[1:], dtype=torch.bool)
        inner[1:-1, 1:-1] = True
        if values[:, inner].mean() < values[:, ~inner].mean():
            direction = -direction
        return cls(mean.float(), direction.float())

    def values(self, tokens: Tensor) -> Tensor:
        """The component of tokens (n, h, w, D), as (n, h, w); above 0 is foreground."""
        return (tokens.detach().float().cpu() - self.mean) @ self.direction

    def mask(self, tokens: Tensor) -> Tensor:
        """Which patches of (n, h, w, D) are foreground: (n, h, w) bool."""
        return self.values(tokens) > 0


def foreground_colours(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Three main components of the foreground patches alone as colours, the others black.

    Args:
        tokens: (n, h, w, D) patch tokens of a set of images, which share one basis.

    Returns:
        (n, 3, h, w) from 0 to 1, and the foreground (n, h, w) bool.

    Raises:
        InputError: fewer than three patches of foreground, or as for `Foreground.fit`.
    """
    mask = Foreground.fit(tokens).mask(tokens)
    basis = PatchPca.fit(tokens.cpu()[mask][None])
    colours = basis.project(tokens.flatten(1, 2), (tokens.shape[1], tokens.shape[2]))
    return colours * mask.unsqueeze(1), mask
