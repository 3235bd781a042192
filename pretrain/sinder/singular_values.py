"""Matrices of which only the singular values are trained: W = U diag(S + e) V^T, with e = 0 at the start."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear

from pretrain.models.vit import VisionTransformer


class SingularLinear(nn.Module):
    """A linear layer whose last rows are such a matrix; the rows before them stay as they are."""

    u: Tensor
    s: Tensor
    vh: Tensor
    fixed: Tensor

    def __init__(self, layer: nn.Linear, fixed_rows: int = 0) -> None:
        """Take over a layer.

        Args:
            layer: decomposed in fp32, once.
            fixed_rows: rows at the start that are not trained: the queries and keys of qkv.
        """
        super().__init__()
        weight = layer.weight.detach().float()
        u, s, vh = torch.linalg.svd(weight[fixed_rows:], full_matrices=False)
        for name, tensor in {"u": u, "s": s, "vh": vh, "fixed": weight[:fixed_rows]}.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.bias = layer.bias
        self.epsilon = nn.Parameter(torch.zeros_like(s))
        self.original = weight
        self._cached: Tensor | None = None
        self._version = -1
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """The whole matrix, fp32: exactly the original one while nothing was trained.

        It is computed once for all forwards between two steps of the optimizer.
        """
        if self._cached is None or self._version != self.epsilon._version:
            whole = self._compose() if self.epsilon.any() else self.original.to(self.epsilon.device)
            self._cached, self._version = whole, self.epsilon._version
        return self._cached

    def _compose(self) -> Tensor:
        with torch.autocast(self.u.device.type, enabled=False):  # the matrix stays for forwards outside, too
            return torch.cat([self.fixed, (self.u * (self.s + self.epsilon)) @ self.vh])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight.to(dtype)
        product: Tensor = _Product.apply(x.to(dtype), self.epsilon, weight, bias, self.u, self.vh)
        return product


class _Product(Function):
    """x W^T + b, with gradients to x and to the singular values of the last rows of W.

    W is given, so that one composition serves all forwards; the rows before need no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, epsilon: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, vh: Tensor
    ) -> Tensor:
        """(..., in) to (..., out); u (rows, k), vh (k, in), epsilon (k,)."""
        ctx.save_for_backward(x, weight, u, vh)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """dL/de_k = u_k^T (dL/dW) v_k."""
        x, weight, u, vh = ctx.saved_tensors
        rows = gradient[..., -len(u) :].flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            to_x = gradient @ weight if ctx.needs_input_grad[0] else None
            to_weight = (rows.T @ x.flatten(0, -2)).float()
            to_epsilon = (u * (to_weight @ vh.T)).sum(dim=0)
        return to_x, to_epsilon, None, None, None, None


def decompose(backbone: VisionTransformer) -> dict[str, SingularLinear]:
    """Replace every linear layer of a backbone's blocks, freeze all else; by name."""
    backbone.requires_grad_(False)
    replaced: dict[str, SingularLinear] = {}
    for name, owner, leaf, layer in list(_linears(backbone)):
        fixed = 2 * layer.in_features if leaf == "qkv" else 0
        replaced[name] = SingularLinear(layer, fixed)
        setattr(owner, leaf, replaced[name])
    return replaced


def _linears(backbone: VisionTransformer) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    for name, owner in backbone.blocks.named_modules():
        for leaf, layer in owner.named_children():
            if isinstance(layer, nn.Linear):
                yield f"blocks.{name}.{leaf}", owner, leaf, layer
