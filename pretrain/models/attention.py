"""Multi-head self-attention over packed sequences; the back end is one function, chosen at build."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pretrain.config import schema
from pretrain.models.packing import Layout

Backend = Literal["sdpa", "math", "varlen", "xformers"]
Attend = Callable[[Tensor, Layout], Tensor]  # packed q, k, v (T, 3, H, d) to (T, H * d)
AttendGroup = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, N, d) to (B, H, N, d)


def resolve_backend(requested: schema.Attention, device: torch.device, bf16: bool) -> Backend:
    """What `auto` stands for: on CPUs in bf16, matmul-softmax-matmul outruns the fused backward.

    Raises:
        InputError: the kernel that is asked for does not run here.
    """
    if requested == "varlen" or requested == "xformers":
        from pretrain.models.packed_attention import refuse_unless_it_runs  # brings torch.compile: a second

        refuse_unless_it_runs(requested, device, bf16)
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


def attend_by_group(attend: AttendGroup, qkv: Tensor, layout: Layout) -> Tensor:
    """Packed q, k, v (T, 3, H, d) to (T, H * d), `attend` once for each group of equally long sequences."""
    parts = zip(qkv.split(layout.tokens), layout.counts, strict=True)
    return torch.cat([_group(attend, part, count) for part, count in parts])


def _group(attend: AttendGroup, qkv: Tensor, count: int) -> Tensor:
    """Attention among `count` equally long sequences: (count * N, 3, H, d) to (count * N, H * d)."""
    q, k, v = qkv.unflatten(0, (count, -1)).permute(2, 0, 3, 1, 4)  # each (count, H, N, d)
    return attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


def attend_at_once(kernel: Attend, qkv: Tensor, layout: Layout) -> Tensor:
    """As `attend_by_group`, by a kernel for GPUs in half precision; elsewhere SDPA.

    Training gives it both. What looks into a model without autocast, the pictures of `log.images` for one,
    does not.
    """
    if qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16):
        return kernel(qkv, layout)
    return attend_by_group(attend_sdpa, qkv, layout)


def attention_function(backend: Backend) -> Attend:
    """The function of a back end."""
    match backend:
        case "sdpa":
            return partial(attend_by_group, attend_sdpa)
        case "math":
            return partial(attend_by_group, attend_math)
        case "varlen" | "xformers":
            from pretrain.models.packed_attention import kernel

            return partial(attend_at_once, kernel(backend))


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
        return self.proj(self.attend(qkv, layout))
