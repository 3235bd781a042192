"""One pre-norm transformer block over packed sequences, with LayerScale and batch-subset drop path."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.models.attention import Attention, Backend
from pretrain.models.ffn import build_ffn
from pretrain.models.packing import Layout, Subset
from pretrain.models.register_neurons import move_to_register


class LayerNorm(nn.LayerNorm):
    """In the dtype of its input, fp32, also where its weights were gathered in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return x * self.gamma


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_layer: str,
        ffn_hidden_dim: int,
        layer_scale: float | None,
        backend: Backend,
        prefix: int = 1,
        register_neurons: Sequence[int] = (),
    ) -> None:
        """Build it without weights.

        Args:
            dim: width D.
            num_heads: of attention.
            ffn_layer: mlp or swiglu.
            ffn_hidden_dim: hidden units M of it.
            layer_scale: initial value, or None for none.
            backend: of attention.
            prefix: tokens before the patches of a sequence; read with `register_neurons` only.
            register_neurons: hidden units whose activations move to the last of these tokens.
        """
        super().__init__()
        self.prefix, self.register_neurons = prefix, tuple(register_neurons)
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, backend)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = build_ffn(ffn_layer, dim, ffn_hidden_dim)  # type: ignore[arg-type]
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        subsets: tuple[Subset, Subset] | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """(T, D) to (T, D); with `subsets`, each branch runs on its own subset of the sequences.

        With `used`, rows (U,) of x, the feed-forward branch runs on these alone, and the output is (U, D).
        """
        attention, ffn = subsets if subsets is not None else (None, None)
        x = _residual(x, layout, attention, lambda y, lay: self.ls1(self.attn(self.norm1(y), lay)))
        if used is not None and not self.register_neurons:
            factors = None if ffn is None else ffn.factors(len(x)).index_select(0, used)
            x = x.index_select(0, used)
            update = self.ls2(self.mlp(self.norm2(x)))
            return x + (update if factors is None else (update * factors).to(x.dtype))
        x = _residual(x, layout, ffn, lambda y, lay: self.ls2(self._feed_forward(self.norm2(y), lay)))
        return x if used is None else x.index_select(0, used)

    def _feed_forward(self, x: Tensor, layout: Layout) -> Tensor:
        if not self.register_neurons:
            return self.mlp(x)
        hidden = move_to_register(self.mlp.hidden(x), layout, self.prefix, self.register_neurons)
        return self.mlp.output(hidden)


def _residual(
    x: Tensor, layout: Layout, subset: Subset | None, branch: Callable[[Tensor, Layout], Tensor]
) -> Tensor:
    if subset is None:
        return x + branch(x, layout)
    update = branch(x.index_select(0, subset.tokens), subset.layout)
    return x.index_add(0, subset.tokens, (update * subset.scale).to(x.dtype))
