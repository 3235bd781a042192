"""Do patch features find the same place in a warped image: nearest neighbours against the known warp."""

import math
from typing import NamedTuple

from torch import Tensor, inf
from torch.nn.functional import normalize

from pretrain.registers.warps import centres, moved

NEAR = 1.0  # patches that a match may be off


class Matches(NamedTuple):
    """Of one pair, in percent of its patches that can be matched."""

    accuracy: float  # matches within a patch of the true place
    cycle: float  # patches that the way there and back leads to within a patch of themselves


def match(
    first: Tensor, second: Tensor, warp: Tensor, kept: tuple[Tensor, Tensor] | None = None
) -> Matches | None:
    """Match the patches of an image with those of its warp.

    Args:
        first: (N, D) patch tokens, any scale; N is a square number.
        second: (N, D) those of the warped image.
        warp: (3, 3) where points of the first go.
        kept: (N,) bool of each: others neither look for a match nor are one, nor do patches whose true place
            is none of these.

    Returns:
        None where no patch stays within the image.
    """
    side = math.isqrt(len(first))
    places = centres(side)
    truth = moved(warp, places)  # (N, 2)
    asked = (truth.abs() < 1).all(dim=-1)
    similarity = (normalize(first.float(), dim=-1) @ normalize(second.float(), dim=-1).T).cpu()
    if kept is not None:
        similarity = similarity.masked_fill(~(kept[0][:, None] & kept[1]), -inf)
        column, row = ((truth + 1) * side / 2).long().clamp(0, side - 1).unbind(-1)
        asked &= kept[0] & kept[1][row * side + column]
    if not asked.any():
        return None
    there = similarity.argmax(dim=1)
    back = similarity.argmax(dim=0)[there]
    near = 2 * NEAR / side * (1 + 1e-9)  # a patch is 2 / side wide
    hits = (places[there] - truth).norm(dim=-1) <= near
    cycles = (places[back] - places).norm(dim=-1) <= near
    return Matches(*(100 * float(found[asked].double().mean()) for found in (hits, cycles)))
