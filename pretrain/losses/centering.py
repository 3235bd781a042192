"""Targets, and the softmax with a running centre that makes them from teacher logits.

Targets of every kind have the form `softmax(logits / temperature + offset)` with one offset per prototype, so
they can be stored as the teacher's features and a (K,) vector. Rows of weight 0 are padding and count
nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pretrain.distributed import all_sum
from pretrain.losses.blocks import cached_bytes, row_blocks
from pretrain.losses.cross_entropy import TargetRows
from pretrain.projection import Projection


@dataclass(frozen=True)
class Target:
    """Targets of one micro-batch, expanded to rows of K probabilities only where there is room for them."""

    projection: Projection
    offset: Tensor  # (K,)
    temp: float
    held: Tensor | None = None  # (rows, K) float32

    def probabilities(self) -> Tensor:
        """(rows, K) float32."""
        return self._rows(slice(None)) if self.held is None else self.held

    def rows(self) -> TargetRows:
        """The same, made block by block where they are not held."""
        number = len(self.projection.features)
        return TargetRows(number, self._rows if self.held is None else self.held.__getitem__)

    def let_go(self) -> "Target":
        """The same targets with nothing held."""
        return replace(self, held=None)

    def _rows(self, block: slice) -> Tensor:
        features, prototypes = self.projection
        return softmax_(Projection(features[block], prototypes).logits(), self.temp, self.offset)


@dataclass(frozen=True)
class JoinedTargets:
    """Targets of one micro-batch whose rows were made in parts, such as one global crop after the other."""

    parts: tuple[Target, ...]

    def probabilities(self) -> Tensor:
        """(rows, K) float32, of all parts."""
        return torch.cat([part.probabilities() for part in self.parts])

    def let_go(self) -> "JoinedTargets":
        """The same targets with nothing held."""
        return JoinedTargets(tuple(part.let_go() for part in self.parts))


def softmax_(logits: Tensor, temp: float, offset: Tensor) -> Tensor:
    """softmax(logits / temp + offset) of (rows, K) float32, in place."""
    for part in row_blocks(logits.shape, cached_bytes(logits.device)):
        scaled = logits[part].mul_(1 / temp).add_(offset)
        scaled.copy_(torch.softmax(scaled, dim=-1))
    return logits


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
