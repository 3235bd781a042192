"""Who am I among the ranks, the reductions of all that looks across images, and what the ranks agree on.

All that looks across the global batch goes through `all_sum`, `all_max` and `all_gather`. Decisions of the
hosts (stop, save, give up) go through `any_rank` and `largest`, on a group of their own that never waits for
a device. Without a process group all of them return their input.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

HOSTS: list[dist.ProcessGroup] = []  # the gloo group of `session`; empty outside of one


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


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is the rank that writes files and talks to people."""
    return rank() == 0


def say(text: str) -> None:
    """Print a line, on rank 0 only."""
    if is_main():
        print(text, flush=True)


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


def all_gather(x: Tensor) -> Tensor:
    """The ranks' tensors of one shape, one after another along the first axis."""
    if not is_distributed():
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def largest(value: int) -> int:
    """The largest of the ranks' numbers; collective, on the hosts."""
    if not is_distributed():
        return value
    numbers = torch.tensor(value)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=_hosts())
    return int(numbers)


def any_rank(flag: bool) -> bool:
    """Whether the flag is true on any rank; collective, on the hosts."""
    return bool(largest(int(flag)))


def barrier() -> None:
    """Wait until all ranks are here; on the hosts."""
    if is_distributed():
        dist.barrier(group=_hosts())


def _hosts() -> dist.ProcessGroup | None:
    """The hosts' group; None, the default group, where something else has started the process group."""
    return HOSTS[0] if HOSTS else None
