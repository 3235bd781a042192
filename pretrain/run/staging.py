"""Copies of tensors on the CPU, to be written while training changes the originals."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain.sharded import local

Tensors = Mapping[str, Tensor]


class Staging:
    """Memory for one copy of a training state, taken at the first copy and used again by all later ones.

    Fresh memory costs more time than the copy itself: the system clears each page. From a GPU the memory is
    pinned, so that the copies run at the speed of the bus.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensors]) -> dict[str, dict[str, Tensor]]:
        """The tensors as they are now, distributed ones as distributed ones; valid until the next call."""
        copies = {
            part: {name: self._copy((part, name), tensor.detach()) for name, tensor in named.items()}
            for part, named in tensors.items()
        }
        if any(tensor.is_cuda for named in tensors.values() for tensor in named.values()):
            torch.cuda.synchronize()
        return copies

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or not _fits(memory, tensor):
            memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._memory[key] = memory
        local(memory).copy_(local(tensor), non_blocking=True)
        return memory


def own_share(tensors: Tensors, rank: int, world_size: int) -> dict[str, Tensor]:
    """What a rank writes: its shards of distributed tensors, and about 1 / world_size of the plain ones.

    Plain tensors are equal on all ranks; each goes, largest first, to the rank that has least so far.
    """
    plain = {name: tensor.nbytes for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    owner, load = {}, [0] * world_size
    for name in sorted(plain, key=lambda name: (-plain[name], name)):
        owner[name] = min(range(world_size), key=load.__getitem__)
        load[owner[name]] += plain[name]
    return {name: tensor for name, tensor in tensors.items() if owner.get(name, rank) == rank}


def _fits(memory: Tensor, tensor: Tensor) -> bool:
    """Whether a copy of the tensor can stand in memory that held another one of its name."""
    if isinstance(memory, DTensor) != isinstance(tensor, DTensor):
        return False
    if isinstance(memory, DTensor) and isinstance(tensor, DTensor):
        placed = memory.device_mesh == tensor.device_mesh and memory.placements == tensor.placements
        if not placed or memory.shape != tensor.shape:
            return False
    one, other = local(memory), local(tensor)
    return one.shape == other.shape and one.dtype == other.dtype
