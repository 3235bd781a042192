"""Do maps of patches lie on the objects of an image: against masks, exact at the level of pixels.

A map has one value for each patch; all its pixels share it evenly. So counts of pixels for each patch are
enough, and nothing is resampled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.analysis.segmentation import IGNORED

MASS = 0.6  # share of the attention that DINO keeps for its segmentations


class Cover(NamedTuple):
    """Pixels of each patch, (n, h, w) float."""

    inside: Tensor  # of the foreground
    counted: Tensor  # all that count

    def area(self) -> Tensor:
        """Share of the foreground, (n,): what a map that knows nothing scores."""
        return self.inside.sum(dim=(1, 2)) / self.counted.sum(dim=(1, 2)).clamp(min=1)


def cover(masks: Tensor, rows: int, cols: int) -> Cover:
    """Foreground (class 1 and up) and all but ignored pixels (255), patch by patch.

    Args:
        masks: (n, S, S') int64 classes, 0 = background; S and S' multiples of `rows` and `cols`.
        rows: h.
        cols: w.
    """
    number, height, width = masks.shape
    cells = masks.view(number, rows, height // rows, cols, width // cols).transpose(2, 3).flatten(3)
    counted = cells != IGNORED
    return Cover(((cells != 0) & counted).sum(dim=-1).double(), counted.sum(dim=-1).double())


def energy_inside(maps: Tensor, covered: Cover) -> Tensor:
    """Share of the maps (n, h, w), not negative, that lies on the foreground: (n,)."""
    inside, counted = ((maps.double() * part).sum(dim=(1, 2)) for part in covered)
    return inside / counted.clamp(min=1e-300)


def pointing(maps: Tensor, covered: Cover) -> Tensor:
    """The pointing game: is at least half of the patch with the highest value foreground; (n,) 0 or 1."""
    values = maps.double().masked_fill(covered.counted == 0, -torch.inf).flatten(1)
    place = values.argmax(dim=1, keepdim=True)
    inside, counted = (part.flatten(1).gather(1, place)[:, 0] for part in covered)
    return (2 * inside >= counted).double()


def overlap(places: Tensor, covered: Cover) -> Tensor:
    """Intersection over union of marked patches (n, h, w) bool and the foreground: (n,)."""
    both = (places * covered.inside).sum(dim=(1, 2))
    either = covered.inside.sum(dim=(1, 2)) + (places * covered.counted).sum(dim=(1, 2)) - both
    return both / either.clamp(min=1)


def mass(maps: Tensor, share: float = MASS) -> Tensor:
    """The brightest patches that hold `share` of each map (..., h, w), as DINO segments: bool."""
    values, order = maps.double().flatten(-2).sort(dim=-1)
    rising = values.cumsum(dim=-1) / values.sum(dim=-1, keepdim=True).clamp(min=1e-300)
    kept = rising > 1 - share
    return torch.zeros_like(kept).scatter(-1, order, kept).view(maps.shape)
