"""Teacher logits to targets: softmax with a running centre, or Sinkhorn-Knopp.

Both end in the same form, `softmax(logits / temperature + offset)` with one offset per prototype, so a target
is stored as the teacher's features and a (K,) vector. Rows of weight 0 are padding and count nowhere.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pretrain.distributed import all_max, all_sum
from pretrain.projection import Projection


@dataclass(frozen=True)
class Target:
    """Targets of one micro-batch, not yet expanded to rows of K probabilities."""

    projection: Projection
    offset: Tensor  # (K,)
    temp: float

    def probabilities(self) -> Tensor:
        """(rows, K) float32."""
        return torch.softmax(self.projection.logits() / self.temp + self.offset, dim=-1)


class SoftmaxCenter(nn.Module):
    """DINO's centring: the offset is -centre / temperature, the centre a running mean of teacher logits."""

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.pending: Tensor | None = None
        self.register_buffer("center", torch.zeros(num_prototypes))

    def offset(self, projections: Sequence[Projection], weights: Sequence[Tensor], temp: float) -> Tensor:
        """The offset (K,) of this step; its logits enter the centre at `commit`, for the steps after it.

        Args:
            projections: the teacher's output for each micro-batch.
            weights: (rows,) per micro-batch; rows count equally, except that weight 0 marks padding.
            temp: teacher temperature.
        """
        offset = -self.center / temp
        total, count = torch.zeros_like(self.center), torch.zeros((), device=self.center.device)
        for projection, weight in zip(projections, weights, strict=True):
            part, rows = projection.weighted_sum((weight > 0).float())
            total, count = total + part, count + rows
        total, count = all_sum(total), all_sum(count)
        mean = torch.where(count > 0, total / count.clamp(min=1), self.center)
        self.pending = self.center * self.momentum + mean * (1 - self.momentum)
        return offset

    def commit(self, good: Tensor) -> None:
        """End of the step: take over the new centre if the step was good (a bool scalar on the device)."""
        if self.pending is not None:
            self.center = torch.where(good, self.pending, self.center)
        self.pending = None


def sinkhorn_offset(
    projections: Sequence[Projection],
    weights: Sequence[Tensor],
    temp: float,
    iterations: int,
    outputs: int | None = None,
) -> Tensor:
    """Sinkhorn-Knopp over the global batch: the offset (K,) after `iterations` rounds.

    The plan is `exp(logits / temp + offset_k + row_j)`. A round makes every prototype's mass equal, then
    every row's; the last row normalisation is the softmax of `Target`. Everything stays in the log domain
    with a collective
    maximum: exp(logits / 0.04) overflows for logits above 3.5, and subtracting one maximum leaves rows of
        zeros.

    Args:
        projections: the teacher's output for each micro-batch.
        weights: (rows,) per micro-batch; weight 0 marks padding.
        temp: teacher temperature.
        iterations: rounds (DINOv2: 3).
        outputs: share the mass among this many first outputs, and give the others none; default: all.
    """
    size = len(projections[0].prototypes)
    projections = [p.first(outputs or size) for p in projections]
    scaled = _scaled_logits(projections, temp)
    rows = [torch.where(w > 0, 0.0, -torch.inf) for w in weights]
    offset = -_log_mass(scaled, rows)
    for _ in range(iterations - 1):
        offsets = [
            r - torch.logsumexp(logits + offset, dim=1) for r, logits in zip(rows, scaled(), strict=True)
        ]
        offset = -_log_mass(scaled, offsets)
    return pad(offset, (0, size - len(offset)), value=-torch.inf)


Passes = Callable[[], Iterable[Tensor]]  # one pass over the logits / temp of every micro-batch


def _scaled_logits(projections: Sequence[Projection], temp: float) -> Passes:
    """The logits of a single micro-batch are kept; those of several are computed again at every pass."""
    if len(projections) > 1:
        return lambda: (p.logits() / temp for p in projections)
    kept = [projections[0].logits() / temp]
    return lambda: kept


def _log_mass(scaled: Passes, rows: Sequence[Tensor]) -> Tensor:
    """Log of each prototype's mass (K,) over all micro-batches and ranks; `rows` are log factors."""
    maxima = [(logits + r.unsqueeze(1)).amax(0) for logits, r in zip(scaled(), rows, strict=True)]
    largest = all_max(torch.stack(maxima).amax(0)).nan_to_num(neginf=0.0)  # -inf: every row is padding
    sums = [
        (logits + r.unsqueeze(1) - largest).exp().sum(0) for logits, r in zip(scaled(), rows, strict=True)
    ]
    mass = all_sum(torch.stack(sums).sum(0))
    return torch.where(mass > 0, largest + mass.log(), 0.0)
