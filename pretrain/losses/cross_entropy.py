"""Cross-entropy of a student's projection with targets, which holds one matrix of K columns in all.

The loss of a row is `-sum_k t_k log softmax(z / temperature)_k`; its gradient in the logits z is
`(sum(t) softmax(z / temperature) - t) / temperature`. It takes the place of the logits, block by block, in
the dtype of the matrix products, and waits there for the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from pretrain.losses.blocks import PRODUCT_BYTES, cached_bytes, row_blocks
from pretrain.projection import Projection


class TargetRows(NamedTuple):
    """Targets that are made where they are needed."""

    number: int
    rows: Callable[[slice], Tensor]  # (rows of the slice, K) float32, which sum to any constant


def cross_entropy(projection: Projection, targets: Sequence[TargetRows], temp: float) -> Tensor:
    """The loss of each row (rows,), float32; the gradient passes into features and prototypes.

    Args:
        projection: of the student.
        targets: of its rows, one part after another.
        temp: student temperature.
    """
    loss: Tensor = _CrossEntropy.apply(projection.features, projection.prototypes, targets, temp)
    return loss


class _CrossEntropy(Function):
    """One product forward, two backward."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, prototypes: Tensor, targets: Sequence[TargetRows], temp: float
    ) -> Tensor:
        logits = linear(features, prototypes)  # (rows, K), from here on overwritten by their gradients
        loss = logits.new_empty(len(logits), dtype=torch.float32)
        numbers = [target.number for target in targets]
        for target, z, out in zip(targets, logits.split(numbers), loss.split(numbers), strict=True):
            for block in row_blocks(z.shape, PRODUCT_BYTES):
                _replace_by_gradient(z[block], target.rows(block), temp, out[block])
        ctx.save_for_backward(features, prototypes, logits)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        features, prototypes, gradient = ctx.saved_tensors
        outer = outer.unsqueeze(1)  # of each row's loss: scales (rows, b) here, not (rows, K)
        of_features = of_prototypes = None
        if ctx.needs_input_grad[0]:
            of_features = (gradient @ prototypes * outer).to(features.dtype)
        if ctx.needs_input_grad[1]:
            of_prototypes = gradient.t() @ (features * outer).to(features.dtype)
        return of_features, of_prototypes, None, None


def _replace_by_gradient(logits: Tensor, targets: Tensor, temp: float, loss: Tensor) -> None:
    """Fill `loss` (rows,), and put the gradient in the place of the logits (rows, K)."""
    for part in row_blocks(logits.shape, cached_bytes(logits.device)):
        t, y = targets[part], torch.log_softmax(logits[part].float() * (1 / temp), dim=-1)
        loss[part] = -(t * y).sum(-1)
        y.exp_().mul_(t.sum(-1, keepdim=True)).sub_(t)
        logits[part] = y.mul_(1 / temp)
