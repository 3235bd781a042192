"""Attention over all packed sequences in one call, by kernels that are told where each sequence begins.

Both run on CUDA devices in half precision only. `varlen` is PyTorch's own FlashAttention, `xformers` what
that package finds fastest. On a GPU they replace one call for each group of crops.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from pretrain.errors import InputError
from pretrain.models.packing import Layout

Kernel = Literal["varlen", "xformers"]
LAYOUTS = 128  # a run has one for the teacher and, under drop path, one for each rate of the student


def sequence_lengths(layout: Layout) -> list[int]:
    """Tokens of each sequence, in order."""
    return [n for count, n in zip(layout.counts, layout.lengths, strict=True) for _ in range(count)]


@lru_cache(LAYOUTS)
def _cached_bounds(layout: Layout, device: torch.device) -> Tensor:
    bounds = torch.tensor([0, *accumulate(sequence_lengths(layout))], dtype=torch.int32)
    return bounds.to(device, non_blocking=True)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def sequence_bounds(layout: Layout, device: torch.device) -> Tensor:
    """Where each sequence begins, and the end, (S + 1,) int32: copied to the device once for a layout."""
    return _cached_bounds(layout, device)


def attend_varlen(qkv: Tensor, layout: Layout) -> Tensor:
    """Packed q, k, v (T, 3, H, d) to (T, H * d), by `torch.nn.attention.varlen`."""
    q, k, v = qkv.unbind(1)  # views: the kernel wants the last axis alone in one piece
    bounds, longest = sequence_bounds(layout, qkv.device), max(layout.lengths)
    mixed: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest)  # a pair where more is asked for
    return mixed.flatten(1)


@lru_cache(LAYOUTS)
def block_mask(layout: Layout, device: torch.device) -> Any:
    """The mask of xformers that lets each token see its own sequence, made once for a layout."""
    return _xformers().fmha.BlockDiagonalMask.from_seqlens(sequence_lengths(layout), device=device)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it picks its kernel in Python, at each call
def attend_xformers(qkv: Tensor, layout: Layout) -> Tensor:
    """Packed q, k, v (T, 3, H, d) to (T, H * d), by `xformers.ops.memory_efficient_attention`."""
    ops = _xformers()
    q, k, v = ops.unbind(qkv.unsqueeze(0), 2)  # (1, T, H, d); their gradients come in one piece
    mask = block_mask(layout, qkv.device)
    return ops.fmha.memory_efficient_attention(q, k, v, mask).squeeze(0).flatten(1)


def kernel(backend: Kernel) -> Callable[[Tensor, Layout], Tensor]:
    """The function of a back end.

    Raises:
        InputError: its package is missing.
    """
    if backend == "varlen":
        return attend_varlen
    _xformers()
    return attend_xformers


def _xformers() -> Any:
    try:
        from xformers import ops
    except ImportError as error:
        fix = "pip install xformers, or set model.attention=auto"
        raise InputError(
            f"model.attention=xformers: no such package to use ({_line(error)}); {fix}"
        ) from error
    return ops


def _line(error: Exception) -> str:
    """The beginning of what it says, which can be pages."""
    return " ".join(str(error).split())[:400]


def refuse_unless_it_runs(backend: Kernel, device: torch.device, bf16: bool) -> None:
    """Ask the kernel itself, by a forward and backward over two short sequences.

    Raises:
        InputError: it needs a GPU, half precision, a package, or another version of one.
    """
    if device.type != "cuda" or not bf16:
        here = f"{device.type} in {'bf16' if bf16 else 'fp32'}; set model.attention=auto"
        raise InputError(f"model.attention={backend} needs a GPU and engine.precision=bf16, not {here}")
    try_kernel(backend, device)


def try_kernel(backend: Kernel, device: torch.device) -> None:
    """Run it once in bf16.

    Raises:
        InputError: it says why it does not.
    """
    attend = kernel(backend)
    qkv = torch.ones(5, 3, 1, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    try:
        attend(qkv, Layout((1, 1), (3, 2))).sum().backward()
    except (RuntimeError, ValueError) as error:  # NotImplementedError is one, too
        fix = "set model.attention=auto"
        raise InputError(f"model.attention={backend} does not run here ({_line(error)}); {fix}") from error
