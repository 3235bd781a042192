"""Sinkhorn-Knopp over the global batch: teacher logits to targets that share the prototypes equally.

The plan is `exp(logits / temperature + offset_k + row_j)`. A round makes every prototype's mass equal, then
every row's. The first round stays in the log domain, with a collective maximum of each prototype:
exp(logits / 0.04) overflows for logits above 3.5, and subtracting one maximum leaves rows of zeros. After it
no sum can vanish: every prototype had mass 1, and a row's factor is at least 1 / K. So later rounds scale
prototypes and rows of one plan, by products with vectors. Rows of weight 0 are padding and count nowhere.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pretrain.distributed import all_max, all_sum
from pretrain.losses.blocks import PRODUCT_BYTES, cached_bytes, row_blocks
from pretrain.losses.centering import Target, softmax_
from pretrain.projection import Projection

HELD_BYTES = 2**28  # of a rank's fp32 targets that wait for the loss; more are computed where they are used


def sinkhorn_targets(
    projections: Sequence[Projection],
    weights: Sequence[Tensor],
    temp: float,
    iterations: int,
    outputs: int | None = None,
    held_bytes: int = HELD_BYTES,
) -> list[Target]:
    """Targets of each micro-batch after `iterations` rounds.

    Args:
        projections: the teacher's output for each micro-batch.
        weights: (rows,) per micro-batch; weight 0 marks padding.
        temp: teacher temperature.
        iterations: rounds (DINOv2: 3).
        outputs: share the mass among this many first outputs, and give the others none; default: all.
        held_bytes: the most that may be held between the passes over the logits and until the loss.
    """
    size = len(projections[0].prototypes)
    first = [p.first(outputs or size) for p in projections]
    needed = 4 * sum(len(p.features) * len(p.prototypes) for p in first)
    plans = [_Plan(p, w, temp, needed <= held_bytes) for p, w in zip(first, weights, strict=True)]
    offset = -_log_mass(plans, temp)
    for plan in plans:
        plan.normalize_rows(offset)
    scale = torch.ones_like(offset)
    for _ in range(iterations - 1):
        mass = all_sum(torch.stack([plan.mass(scale) for plan in plans]).sum(0))
        scale = torch.where(mass > 0, 1 / mass, 1.0)
    total = pad(offset + scale.log(), (0, size - len(offset)), value=-torch.inf)
    pairs = zip(projections, plans, strict=True)
    return [Target(p, total, temp, plan.targets(scale, size)) for p, plan in pairs]


class _Plan:
    """The rows of one micro-batch: held, or computed from the projection in every pass over them."""

    def __init__(self, projection: Projection, weights: Tensor, temp: float, hold: bool) -> None:
        self.projection, self.temp = projection, temp
        self.valid = (weights > 0).float()
        self.offset: Tensor | None = None  # once rows are normalised
        self.held = projection.logits() if hold else None

    def normalize_rows(self, offset: Tensor) -> None:
        """From here on rows are softmax(logits / temp + offset)."""
        self.offset = offset
        if self.held is not None:
            softmax_(self.held, self.temp, offset)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits, or the plan once its rows are normalised, (n, K) each, and whether rows count, (n,)."""
        shape = len(self.projection.features), len(self.projection.prototypes)
        for large in row_blocks(shape, PRODUCT_BYTES):
            rows = self._computed(large) if self.held is None else self.held[large]
            for small in row_blocks(rows.shape, cached_bytes(rows.device)):
                yield rows[small], self.valid[large][small]

    def _computed(self, block: slice) -> Tensor:
        features, prototypes = self.projection
        logits = Projection(features[block], prototypes).logits()
        return logits if self.offset is None else softmax_(logits, self.temp, self.offset)

    def mass(self, scale: Tensor) -> Tensor:
        """Mass (K,) of each unscaled prototype, with rows normalised after the prototypes were scaled."""
        mass = torch.zeros_like(scale)
        for plan, valid in self.blocks():
            mass += (valid / (plan @ scale)) @ plan
        return mass

    def targets(self, scale: Tensor, size: int) -> Tensor | None:
        """The rows (rows, K) for the last scale of the prototypes, where they are held."""
        if self.held is None:
            return None
        for plan, _ in self.blocks():
            plan.mul_(scale).div_(plan.sum(1, keepdim=True))
        return pad(self.held, (0, size - len(scale))) if size > len(scale) else self.held


def _log_mass(plans: Sequence[_Plan], temp: float) -> Tensor:
    """Log of each prototype's mass (K,), of exp(logits / temp) over all micro-batches and ranks.

    In one pass: a sum relative to the largest value so far is scaled when a larger one comes.
    """
    outputs = len(plans[0].projection.prototypes)
    zeros = plans[0].valid.new_zeros(outputs)
    largest, mass = zeros - torch.finfo(torch.float32).max, zeros
    for plan in plans:
        for logits, valid in plan.blocks():
            scaled = (logits * (1 / temp)).add_(valid.log().unsqueeze(1))  # padding: -inf
            top = torch.maximum(largest, scaled.amax(0))
            mass = mass * (largest - top).exp() + scaled.sub_(top).exp_().sum(0)
            largest = top
    top = all_max(largest.clone())
    mass = all_sum(mass * (largest - top).exp())
    return torch.where(mass > 0, top + mass.log(), 0.0)
