"""Memory of a training run: what its state takes, computed before anything is allocated, and what it took."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, cast

import torch

from pretrain.config.schema import Config
from pretrain.heads.rmlp import RmlpHead
from pretrain.method.branch import SSLBranch

FP32 = 4  # bytes; parameters, gradients, optimizer and teacher are fp32 whatever the precision of the compute


class Footprint(NamedTuple):
    """Parameters, and the bytes of what stays in memory between the forwards."""

    backbone: int  # parameters
    heads: int  # parameters
    drawn: int  # weights that randomized heads draw for a step, both losses and branches
    drawn_bytes: int  # of each of those: fp32, and in bf16 a rounded copy

    @property
    def branch(self) -> int:
        """Bytes of the student's weights; its gradients and the teacher take the same each."""
        return FP32 * (self.backbone + self.heads)

    @property
    def optimizer(self) -> int:
        """Bytes of AdamW's two moments."""
        return 2 * self.branch

    @property
    def total(self) -> int:
        """Bytes of student, gradients, moments, teacher and draws."""
        return 3 * self.branch + self.optimizer + self.drawn_bytes * self.drawn


def footprint(cfg: Config) -> Footprint:
    """The footprint of a configuration; allocates nothing."""
    with torch.device("meta"):
        branch = SSLBranch(cfg, "student")
    backbone = sum(p.numel() for p in branch.backbone.parameters())
    heads = {cast(RmlpHead, head).stream: cast(RmlpHead, head).widths for head in branch.rmlp.values()}
    drawn = sum(n * m for widths in heads.values() for n, m in pairwise(widths))
    branches = 1 if cfg.rmlp.share_student_teacher else 2
    rounded = 2 * bool(cfg.engine.precision == "bf16")
    trainable = sum(p.numel() for p in branch.parameters()) - backbone
    return Footprint(backbone, trainable, branches * drawn, FP32 + rounded)


def crop_bytes(cfg: Config) -> int:
    """Bytes of one image's crops as uint8; a step holds those of all its micro-batches at once."""
    data = cfg.data
    pixels = 2 * data.global_crops.size**2 + data.local_crops.number * data.local_crops.size**2
    return cfg.model.in_channels * pixels


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds: of a GPU's memory its tensors, of a CPU's all its resident pages."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """The largest `used_memory` of this process so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A field of Linux's account of this process, in bytes (getrusage's peak would include the parent's)."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024
