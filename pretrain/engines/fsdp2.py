"""Weights, gradients and optimizer state in shards, one on each device; a block is gathered while it runs."""

import warnings
from itertools import pairwise
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from pretrain.batch import Batch
from pretrain.config.schema import EngineConfig, OptimConfig
from pretrain.engines.single import SingleEngine
from pretrain.errors import InputError
from pretrain.method.branch import SSLBranch
from pretrain.method.outputs import BranchOutput
from pretrain.models.vit import Features, VisionTransformer
from pretrain.sharded import local

# The outputs of a branch are views of packed tokens, and nothing changes them in place.
warnings.filterwarnings(
    "ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning
)


class Fsdp2Engine(SingleEngine):
    """`SingleEngine` over sharded branches: what is elementwise works on shards, without communication."""

    def __init__(
        self,
        student: SSLBranch,
        teacher: SSLBranch,
        method: nn.Module,
        optim: OptimConfig,
        engine: EngineConfig,
        device: torch.device,
    ) -> None:
        """As for `SingleEngine`; a process group must be running, and branches may be on the meta device.

        Raises:
            InputError: the number of ranks is not a multiple of `engine.fsdp2.replicate`.
        """
        mesh = build_mesh(device.type, engine.fsdp2.replicate)
        for branch in (student, teacher):
            shard(branch, mesh, engine.precision)
            materialize(branch, device)
        super().__init__(student, teacher, method, optim, engine, device)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See `Engine`; gradients travel with the last micro-batch only."""
        _sharded(self.branches["student"]).set_requires_gradient_sync(last)
        super().backward(loss, last)

    def teacher(self, batch: Batch) -> BranchOutput:
        """See `Engine`."""
        output = super().teacher(batch)
        self._let_go()
        return output

    def features(self, images: Tensor) -> Features:
        """See `Engine`."""
        features = super().features(images)
        self._let_go()
        return features

    def _let_go(self) -> None:
        """Free the gathered root of the teacher: kept, it would miss the next update of the shards."""
        _sharded(self.branches["teacher"]).reshard()

    def teacher_backbone(self) -> VisionTransformer:
        """See `Engine`; a whole copy, on every rank."""
        sharded = self.branches["teacher"].backbone
        backbone = VisionTransformer(sharded.cfg, sharded.backend)
        state = {name: value.full_tensor() for name, value in sharded.state_dict().items()}
        backbone.load_state_dict(state)
        return backbone.to(self.device).eval().requires_grad_(False)


def build_mesh(device_type: str, replicate: int) -> DeviceMesh:
    """Devices in one dimension (all shard) or two (`replicate` copies, each sharded over the rest).

    Raises:
        InputError: the number of ranks is not a multiple of `replicate`.
    """
    ranks = dist.get_world_size()
    if ranks % replicate:
        raise InputError(
            f"engine.fsdp2.replicate={replicate} does not divide the {ranks} devices; change one"
        )
    if replicate == 1:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    shape = (replicate, ranks // replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(branch: SSLBranch, mesh: DeviceMesh, precision: Literal["fp32", "bf16"]) -> None:
    """Shard a branch in place: each block by itself, the rest as the root.

    Blocks are gathered in the compute precision and their gradients reduced in fp32. The root (embeddings,
    final norm, heads) stays in fp32: its weights are few beside the blocks', and prototypes are normalised.
    """
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if precision == "bf16" else MixedPrecisionPolicy()
    units = branch.fsdp_units()
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(branch, mesh=mesh)
    for unit, following in pairwise(units):
        _sharded(unit).set_modules_to_forward_prefetch([_sharded(following)])


def materialize(branch: SSLBranch, device: torch.device) -> None:
    """Give the shards of a branch on the meta device memory full of NaN: what is forgotten shows."""
    if not any(parameter.is_meta for parameter in branch.parameters()):
        branch.to(device)
        return
    buffers = {name: buffer.clone() for name, buffer in branch.named_buffers() if not buffer.is_meta}
    branch.to_empty(device=device)
    for parameter in branch.parameters():
        local(parameter.detach()).fill_(torch.nan)
    for name, buffer in branch.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def _sharded(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule), "fully_shard changes the class of a module"
    return module
