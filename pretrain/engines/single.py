"""One device, no communication."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.config.schema import EngineConfig, OptimConfig
from pretrain.distributed import is_main
from pretrain.engines.activations import checkpoint_activations
from pretrain.engines.base import StepResult
from pretrain.engines.guard import StepGuard
from pretrain.engines.optimizer import build_adamw, optimizer_tensors, step_unless
from pretrain.method.branch import SSLBranch, branch_output
from pretrain.method.outputs import BranchOutput
from pretrain.method.signals import norms
from pretrain.models.vit import Features, VisionTransformer
from pretrain.optim.groups import set_step_values
from pretrain.optim.schedules import StepValues
from pretrain.sharded import full, local

RECOMPILE_LIMIT = 32


class SingleEngine:
    """Student, teacher and method on one CPU or GPU, in fp32 or with bf16 autocast."""

    def __init__(
        self,
        student: SSLBranch,
        teacher: SSLBranch,
        method: nn.Module,
        optim: OptimConfig,
        engine: EngineConfig,
        device: torch.device,
    ) -> None:
        self.device = device
        self.branches = {"student": student.to(device), "teacher": teacher.to(device)}
        self.method = method.to(device)
        teacher.requires_grad_(False).eval()
        checkpoint_activations(student.backbone.blocks, engine.activation_checkpointing)
        if engine.compile:
            compile_blocks(self.branches.values())
        self.clip_grad_norm = optim.clip_grad_norm
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=engine.precision == "bf16")
        self.optimizer = build_adamw(student, optim)
        self.guard = StepGuard(optim.spike_factor).to(device)
        self.loss = torch.zeros((), device=device)
        self.good = torch.ones((), dtype=torch.bool, device=device)
        self.clip_units = _parameters_by_child(student)
        self.ema_pairs = [local(p) for p in teacher.parameters()], [local(p) for p in student.parameters()]

    def begin_step(self, step: int, values: StepValues) -> None:
        """See `Engine`."""
        set_step_values(self.optimizer.param_groups, values)
        for branch in self.branches.values():
            branch.begin_step(step)

    def student(self, batch: Batch) -> BranchOutput:
        """See `Engine`."""
        with self.autocast:
            return branch_output(self.branches["student"](batch))

    @torch.no_grad()
    def teacher(self, batch: Batch) -> BranchOutput:
        """See `Engine`."""
        with self.autocast:
            return branch_output(self.branches["teacher"](batch))

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """See `Engine`."""
        with self.autocast:
            return Features(**self.branches["teacher"](images.to(self.device)))

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See `Engine`."""
        loss.backward()
        self.loss += loss.detach()

    def step(self) -> StepResult:
        """See `Engine`."""
        grad_norms = {
            name: clip_gradients(parameters, self.clip_grad_norm)
            for name, parameters in self.clip_units.items()
        }
        self.good = self.guard.check(self.loss, grad_norms.values())
        step_unless(~self.good, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.zero_()
        return StepResult(grad_norms, self.good)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See `Engine`."""
        teacher, student = self.ema_pairs
        weight = (1 - momentum) * self.good  # 0 after a bad step
        torch._foreach_lerp_(teacher, student, [weight] * len(teacher))

    def layer_norms(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: full(norm) for name, norm in norms(self.branches["student"]).items()}

    def teacher_backbone(self) -> VisionTransformer:
        """See `Engine`."""
        return self.branches["teacher"].backbone

    def bad_steps(self) -> tuple[int, int]:
        """See `Engine`."""
        total, in_a_row = torch.stack([self.guard.bad_steps, self.guard.bad_run]).tolist()
        return int(total), int(in_a_row)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """See `Engine`."""
        parts = {**self.branches, "method": self.method, "guard": self.guard}
        model = {f"{name}.{key}": value for name, m in parts.items() for key, value in m.state_dict().items()}
        return {"model": model, "optim": optimizer_tensors(self.optimizer)}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """See `Engine`."""
        current = self.state_dict()
        for part, tensors in state.items():
            for key, value in tensors.items():
                current[part][key].copy_(value)

    def save_native(self, folder: Path) -> None:
        """See `Engine`: `state_dict` holds everything."""

    def load_native(self, folder: Path) -> bool:
        """See `Engine`: `state_dict` holds everything."""
        return True

    def full_state_dict(self, branch: Literal["student", "teacher"]) -> dict[str, Tensor]:
        """See `Engine`."""
        gathered = ((key, full(value)) for key, value in self.branches[branch].state_dict().items())
        return {key: value.detach().cpu().clone() for key, value in gathered if is_main()}


def compile_blocks(branches: Iterable[SSLBranch]) -> None:
    """Compile each block in place: names of parameters stay.

    All blocks share their compiled code, and it has more variants than the 8 that PyTorch allows before it
    gives up: student, teacher and k-NN, inner and last blocks, each at first for one number of tokens and
    then for any.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for branch in branches:
        for block in branch.backbone.blocks:
            block.compile()


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """The gradients' total norm; they are scaled down to `limit` when it is exceeded (0 = never)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:  # heads that randomized ones have replaced
        return torch.zeros((), device=parameters[0].device)
    norm = nn.utils.get_total_norm(gradients)
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return full(norm)


def _parameters_by_child(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by sub-module (backbone, dino_head, ibot_head): DINOv2 clips each on its own."""
    children: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        children[name.split(".")[0]].append(parameter)
    return dict(children)
