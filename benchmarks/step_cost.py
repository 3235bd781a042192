"""What a step costs: operations counted, seconds by the clock of the device, memory at the peak."""

import resource
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from step_ours import GLOBAL_SIZE

from pretrain.config.derived import drop_path_rates, ffn_hidden_dim, kept_rows, rmlp_widths, vit_shape
from pretrain.config.schema import Config


def now(device: torch.device) -> Any:
    """A point in time: CPU seconds of the process, or an event on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def durations(points: Sequence[Any]) -> list[float]:
    """Seconds between neighbours in a list of points."""
    if isinstance(points[0], float):
        return [end - start for start, end in pairwise(points)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(points)]


def device_name(device: torch.device) -> str:
    """For people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def peak_bytes(device: torch.device) -> int:
    """Most memory of this process so far: resident on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Cost:
    """Floating-point operations of a step's matrix products, 2 for each multiply-add.

    Student with its backward (twice the forward) on all tokens of all crops, teacher on the global crops; the
    last feed-forward layer and the heads on class tokens and masked patches alone, which is all that the
    losses read. No gradient reaches the images or the matrices of an RMLP.
    Element-wise work, KoLeo and what is computed a second time count nothing.
    """

    def __init__(self, cfg: Config, masked: float) -> None:
        self.cfg, self.model, self.dim = cfg, cfg.model, vit_shape(cfg.model).embed_dim
        local, images, head = cfg.data.local_crops, cfg.data.group_size, cfg.dino_head
        sizes = ((2 * images, GLOBAL_SIZE), (local.number * images, local.size))
        self.groups = [(crops, 1 + (size // cfg.model.patch_size) ** 2) for crops, size in sizes]
        self.tokens = sum(crops * length for crops, length in self.groups)
        self.rows = 2 * images + masked  # of the teacher's head
        hidden = [head.hidden_dim] * (head.num_layers - 1)
        self.widths = [self.dim, *hidden, head.bottleneck_dim, head.prototypes]
        if head.kind == "rmlp":
            self.widths = [*rmlp_widths(self.dim, cfg.rmlp.outputs)]

    def total(self) -> float:
        """Of a step."""
        patch = 2 * self.model.in_channels * self.model.patch_size**2 * self.dim
        embed = [crops * (length - 1) * patch for crops, length in self.groups]
        student = sum(self.blocks(*group, drop=True) for group in self.groups)
        factor = 3 if self.cfg.dino_head.kind == "mlp" else 2
        local = self.groups[1][0]
        rows = factor * (local + self.rows) + self.rows
        head = 2 * sum(n * m for n, m in pairwise(self.widths))
        last = (3 * (local + self.rows) + self.rows) * self.ffn()
        return 3 * student + self.blocks(*self.groups[0]) + 3 * embed[0] + 2 * embed[1] + last + rows * head

    def blocks(self, crops: int, length: int, drop: bool = False) -> float:
        """Forward but for the last feed-forward layer; a token costs 8 D^2 in qkv, proj and 4 N D mixing."""
        kept = [kept_rows(rate, crops) if drop else crops for rate in drop_path_rates(self.model)]
        attention = 8 * self.dim**2 + 4 * length * self.dim
        return length * (sum(kept) * attention + sum(kept[:-1]) * self.ffn())

    def ffn(self) -> float:
        """A token's feed-forward layer."""
        return 2 * (3 if self.model.ffn_layer == "swiglu" else 2) * self.dim * ffn_hidden_dim(self.model)


def matrix_ceiling(cost: Cost, device: torch.device) -> tuple[float, Sequence[int]]:
    """The fastest torch.mm of shapes like the model's, and of a square: operations a second, (m, k, n)."""
    dim, square = cost.dim, 2048 if device.type == "cpu" else 8192
    shapes = [(cost.tokens, dim, 3 * dim), (cost.tokens, dim, 4 * dim), (cost.tokens, 4 * dim, dim)]
    shapes += [(round(cost.rows), *cost.widths[-2:]), (square, square, square)]
    dtype = torch.bfloat16 if cost.cfg.engine.precision == "bf16" else torch.float32
    return max((mm_rate(*shape, dtype, device), shape) for shape in shapes)


def mm_rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of (m, k) @ (k, n), the best of several."""
    left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    out, points = torch.empty(m, n, dtype=dtype, device=device), [now(device)]
    for _ in range(10):
        torch.mm(left, right, out=out)
        points.append(now(device))
    return 2 * m * k * n / min(durations(points))
