"""Who am I among the ranks, and the reductions of everything that looks across images.

Every sum or maximum over the global batch goes through `all_sum` and `all_max`; without a process group they
return their input.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import InputError


def pick_device(requested: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of `engine.device`; auto takes a GPU when there is one.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        raise InputError("engine.device=cuda: this process sees no GPU; use engine.device=cpu or auto")
    return torch.device("cuda" if has_gpu and requested != "cpu" else "cpu")


def free_memory(device: torch.device) -> int:
    """Bytes that an allocation on the device can still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo").read_text()
    return int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024


def is_distributed() -> bool:
    """Whether a process group is running."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def is_main() -> bool:
    """Whether this process is rank 0: the one that writes and speaks."""
    return rank() == 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if is_distributed():
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def all_max(x: Tensor) -> Tensor:
    """Elementwise maximum over ranks, in place."""
    if is_distributed():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x
