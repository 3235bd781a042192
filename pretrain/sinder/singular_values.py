"""Matrices of which only the singular values are trained: W = U diag(S + e) V^T, with e = 0 at the start."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pretrain.models.vit import VisionTransformer


class SingularLinear(nn.Module):
    """A linear layer whose last rows are such a matrix; the rows before them stay as they are."""

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
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    def weight(self) -> Tensor:
        """The whole matrix, fp32: exactly the original one while nothing was trained."""
        if not self.epsilon.requires_grad and not self.epsilon.any():
            return self.original.to(self.epsilon.device)
        trained: Tensor = (self.u * (self.s + self.epsilon)) @ self.vh  # type: ignore[operator]
        return torch.cat([self.fixed, trained])  # type: ignore[list-item]

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
