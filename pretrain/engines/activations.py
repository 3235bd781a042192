"""Activation checkpointing: what a block computed is dropped and computed again in the backward pass.

Masks, subsets and randomized weights enter a block as tensors and nothing is drawn inside, so the second pass
computes what the first one did. Names of parameters do not change.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretrain.config.schema import Recomputed

aten = torch.ops.aten
KEPT = frozenset(  # dear to compute, and small beside what lies between them
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._efficient_attention_forward.default,
    }
)
KEPT_BY_NAME = frozenset(  # likewise; they exist once their package is imported
    {
        "torch_attn._varlen_attn.default",
        "xformers_flash.flash_fwd.default",
        "xformers_flash3.flash_fwd.default",
    }
)


def checkpoint_activations(blocks: Iterable[nn.Module], mode: Recomputed) -> None:
    """Let each block compute its activations again in the backward pass.

    Args:
        blocks: of the student.
        mode: none; full: keep a block's input only; selective: also matrix products and attention.
    """
    if mode == "none":
        return
    # torch.compile follows `context_fn` only where it says something
    contexts: dict[str, Any] = {"context_fn": _keep_products} if mode == "selective" else {}
    for block in blocks:
        block.forward = _recomputed(block.forward, contexts)


def _recomputed(forward: Callable[..., Tensor], contexts: dict[str, Any]) -> Callable[..., Tensor]:
    def run(*inputs: Any) -> Tensor:
        output: Tensor = checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts
        )
        return output

    return run


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def is_kept(operation: Any) -> bool:
    """Whether selective checkpointing keeps the results of a dispatched operation."""
    return operation in KEPT or str(operation) in KEPT_BY_NAME


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operation) else CheckpointPolicy.PREFER_RECOMPUTE
