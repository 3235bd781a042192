"""Checkpoints of one state in every layout, each loaded into every layout. A script: FOLDER."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pretrain.run.checkpoint import Checkpoints, load_checkpoint
from tests.run.forked import run_ranks

LAYOUTS = {  # name: world size (0: no process group), mesh; none: plain tensors
    "plain 1": (0, None),
    "plain 2": (2, None),
    "shards 2": (2, (2,)),
    "shards 4": (4, (4,)),
    "shards 2x2": (4, (2, 2)),
}
State = dict[str, dict[str, Tensor]]


def state() -> State:
    """Sizes that divide by the ranks and sizes that do not, fewer rows than ranks, other types, scalars."""
    draw = torch.Generator().manual_seed(0)
    model = {
        "large": torch.randn(1000, 64, generator=draw),
        "uneven": torch.randn(5, 3, generator=draw),
        "one row": torch.randn(1, 7, generator=draw),
        "bf16": torch.randn(6, 5, generator=draw).bfloat16(),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "count": torch.tensor(2**53 + 1),
    }
    return {"model": model, "optim": {"large.exp_avg": -model["large"], "large.step": torch.tensor(9.0)}}


def lay_out(tensors: State, shape: tuple[int, ...] | None) -> State:
    """The tensors as an engine of that layout holds them: scalars are never sharded."""
    if shape is None:
        return tensors
    mesh = init_device_mesh("cpu", shape)
    placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
    return {
        part: {n: distribute_tensor(t, mesh, placements) if t.ndim else t for n, t in named.items()}
        for part, named in tensors.items()
    }


def whole(tensor: Tensor) -> bytes:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(folder: Path, layout: str) -> None:
    tensors = lay_out(state(), LAYOUTS[layout][1])
    for asynchronous in (False, True):
        with Checkpoints(folder / layout / str(asynchronous), 3, 0, asynchronous) as checkpoints:
            checkpoints.save(7, tensors, {"position": 56}, {"saved by": layout})


def load_all(folder: Path, layout: str) -> None:
    expected = {part: {n: whole(t) for n, t in named.items()} for part, named in state().items()}
    for writer in LAYOUTS:
        equal = True
        for asynchronous in (False, True):
            empty = {p: {n: torch.ones_like(t) for n, t in named.items()} for p, named in state().items()}
            tensors = lay_out(empty, LAYOUTS[layout][1])
            path = folder / writer / str(asynchronous) / "latest"
            assert load_checkpoint(path, tensors) == ({"position": 56}, {"saved by": writer})
            found = {part: {n: whole(t) for n, t in named.items()} for part, named in tensors.items()}
            equal = equal and found == expected
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{writer} -> {layout}: {'equal' if equal else 'DIFFERS'}", flush=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name, (world_size, _) in LAYOUTS.items():
        run_ranks(world_size, partial(save, target, name), target / f"{name}.save")
    for name, (world_size, _) in LAYOUTS.items():
        run_ranks(world_size, partial(load_all, target, name), target / f"{name}.load")
