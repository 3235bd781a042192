"""The engine protocol: placement, precision, gradients, clipping, optimizer, EMA and their state.

The loop owns the order of calls, the method the mathematics, the loader the position.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.method.outputs import BranchOutput
from pretrain.models.vit import Features, VisionTransformer
from pretrain.optim.schedules import StepValues


class StepResult(NamedTuple):
    """What a step reports, on the device."""

    grad_norms: dict[str, Tensor]  # before clipping, per sub-module
    good: Tensor  # bool; a bad step has changed nothing


class Engine(Protocol):
    """What the training loop calls."""

    device: torch.device

    def student(self, batch: Batch) -> BranchOutput:
        """The student's output for a micro-batch."""

    def teacher(self, batch: Batch) -> BranchOutput:
        """The teacher's output, without gradient."""

    def begin_step(self, step: int, values: StepValues) -> None:
        """Set learning rates and weight decay, and draw randomized heads."""

    def features(self, images: Tensor) -> Features:
        """The teacher backbone's features of (B, C, S, S) images; collective: equally often on every rank."""

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of a micro-batch; `last` marks the last one of the step."""

    def step(self) -> StepResult:
        """Clip, judge the step, update the student if it is good, drop the gradients."""

    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, after a good step."""

    def layer_norms(self) -> dict[str, Tensor]:
        """Norms of the student's weights and gradients per layer; between `backward` and `step`."""

    def teacher_backbone(self) -> VisionTransformer:
        """The teacher's backbone with whole weights on every rank, to look into; collective."""

    def bad_steps(self) -> tuple[int, int]:
        """Steps skipped so far, and how many of them in a row just now; waits for the device."""

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The tensors to resume from: `model` (both branches, the method) and `optim` (by parameter name)."""

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Take over what `state_dict` of the same configuration returned."""

    def save_native(self, folder: Path) -> None:
        """Write what `state_dict` does not hold of the optimizer's state; collective."""

    def load_native(self, folder: Path) -> bool:
        """Take over what `save_native` wrote; False where there is nothing."""

    def full_state_dict(self, branch: Literal["student", "teacher"]) -> dict[str, Tensor]:
        """One branch's weights, whole, on the CPU of rank 0."""
