"""The start of the DeepSpeed engine: the environment first, then the import, then a process group."""

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from pretrain.config.schema import EngineConfig, OptimConfig
from pretrain.engines.base import Engine
from pretrain.engines.deepspeed_environment import prepare_environment
from pretrain.errors import InputError
from pretrain.method.branch import SSLBranch


def build_deepspeed(
    student: SSLBranch,
    teacher: SSLBranch,
    method: nn.Module,
    optim: OptimConfig,
    engine: EngineConfig,
    device: torch.device,
) -> Engine:
    """The DeepSpeed engine, in a process group that is there or, for one process, is made here.

    Raises:
        InputError: DeepSpeed is not installed.
    """
    prepare_environment(device)
    try:
        from pretrain.engines.deepspeed_engine import DeepSpeedEngine, start_communication
    except ImportError as error:
        raise InputError(
            f"engine.kind=deepspeed: DeepSpeed cannot be imported ({error}); "
            "pip install 'pretrain[deepspeed]', or use engine.kind=fsdp2"
        ) from error
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    start_communication()
    return DeepSpeedEngine(student, teacher, method, optim, engine, device)
