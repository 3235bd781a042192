"""Matrices of which only the singular values are trained: W = U diag(S + e) V^T, with e = 0 at the start."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
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
    def weight(self) -> Tensor:
        """The whole matrix, fp32: exactly the original one while nothing was trained.

        Without gradients it is computed once for all forwards between two steps of the optimizer.
        """
        if torch.is_grad_enabled():
            return self._compose()
        if self._cached is None or self._version != self.epsilon._version:
            whole = self._compose() if self.epsilon.any() else self.original.to(self.epsilon.device)
            self._cached, self._version = whole, self.epsilon._version
        return self._cached

    def _compose(self) -> Tensor:
        trained = (self.u * (self.s + self.epsilon)) @ self.vh
        return torch.cat([self.fixed, trained])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


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
