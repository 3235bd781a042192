"""Multi-head self-attention over packed sequences; the back end is one function, chosen at build."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pretrain.models.packing import Layout

Backend = Literal["sdpa", "math"]


def resolve_backend(requested: Literal["auto", "sdpa", "math"], device: torch.device, bf16: bool) -> Backend:
    """What `auto` stands for: on CPUs in bf16, matmul-softmax-matmul outruns the fused backward."""
    if requested != "auto":
        return requested
    return "math" if device.type == "cpu" and bf16 else "sdpa"


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by PyTorch's fused kernel; all (B, H, N, d)."""
    return scaled_dot_product_attention(q, k, v)


def attend_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as three plain operations; all (B, H, N, d). A softmax of half precision works in fp32."""
    shape, scale = q.shape, q.shape[-1] ** -0.5
    q, k, v = (x.reshape(-1, *shape[-2:]) for x in (q, k, v))  # a product of three axes saves copies
    scores = torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=scale)
    return (scores.softmax(dim=-1) @ v).view(shape)


def attention_function(backend: Backend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of a back end: q, k, v (B, H, N, d) to (B, H, N, d)."""
    match backend:
        case "sdpa":
            return attend_sdpa
        case "math":
            return attend_math


class Attention(nn.Module):
    """Self-attention within each sequence of the layout. Fused qkv weights, order q | k | v."""

    def __init__(self, dim: int, num_heads: int, backend: Backend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attend = attention_function(backend)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(T, D) to (T, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (T, 3, H, d)
        parts = zip(qkv.split(layout.tokens), layout.counts, strict=True)
        return self.proj(torch.cat([self._group(part, count) for part, count in parts]))

    def _group(self, qkv: Tensor, count: int) -> Tensor:
        """Attention among `count` equally long sequences: (count * N, 3, H, d) to (count * N, D)."""
        q, k, v = qkv.unflatten(0, (count, -1)).permute(2, 0, 3, 1, 4)  # each (count, H, N, d)
        return self.attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
