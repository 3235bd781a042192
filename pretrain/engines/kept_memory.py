"""What the student's blocks keep for the backward pass under each activation checkpointing, counted.

Counted are tensors, block by block, with the kernels of the device: nothing of it is a formula, and no
setting has to be run for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.batch import Batch
from pretrain.config.schema import Recomputed
from pretrain.engines.activations import is_kept
from pretrain.engines.single import SingleEngine
from pretrain.models.block import Block


class KeptMemory(NamedTuple):
    """Bytes for the images of a batch."""

    none: int
    selective: int
    full: int
    block: int  # of the block that keeps most with none: what computing a block again brings back

    def peak(self, mode: Recomputed) -> int:
        """The most that is there at once: with checkpointing also the block that is computed again."""
        return self.none if mode == "none" else getattr(self, mode) + self.block


@torch.no_grad()
def kept_memory(engine: SingleEngine, batch: Batch) -> KeptMemory:
    """Count it in one more forward of the student, whatever checkpointing the engine has."""
    counts: list[tuple[int, int, int]] = []

    def count(block: Any, inputs: tuple[Any, ...]) -> None:
        counts.append(_block(block, inputs))

    blocks = engine.branches["student"].backbone.blocks
    hooks = [block.register_forward_pre_hook(count) for block in blocks]
    try:
        engine.student(batch)
    finally:
        for hook in hooks:
            hook.remove()
    none, selective, full = (sum(column) for column in zip(*counts, strict=True))
    return KeptMemory(none, selective, full, max(kept for kept, _, _ in counts))


def _block(block: Block, inputs: tuple[Any, ...]) -> tuple[int, int, int]:
    """Bytes that a block keeps with none, selective and full."""
    x = inputs[0].detach().requires_grad_()
    products = _Products()
    with torch.enable_grad(), _saved(block) as saved, products:
        output = Block.forward(block, x, *inputs[1:])  # past a checkpoint around it
    del output  # not before: what is freed gives its address to others
    return sum(saved.values()), x.nbytes + products.bytes, x.nbytes


@contextmanager
def _saved(block: Block) -> Iterator[dict[int, int]]:
    """Bytes of the memory that autograd saves, by address; without weights and autocast's copies of them."""
    found: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    copied = {(torch.bfloat16, *sorted(p.shape)) for p in block.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and (tensor.dtype, *sorted(tensor.shape)) not in copied:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


class _Products(TorchDispatchMode):
    """Bytes of what selective checkpointing keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if is_kept(func):
            tensors = output if isinstance(output, tuple) else (output,)
            self.bytes += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        return output
