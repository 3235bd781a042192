"""DeepSpeed's ZeRO, stages 1 to 3: fp32 parameters, our AdamW, our clipping, our decision about bad steps.

Imported only by `deepspeed_start`, which settles the environment first. Names of modules, parameters and
state are those of the other engines.
"""

import logging
import warnings
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.config.schema import EngineConfig, OptimConfig
from pretrain.distributed import world_size
from pretrain.engines.base import StepResult
from pretrain.engines.deepspeed_checkpoint import load_optimizer, save_optimizer
from pretrain.engines.deepspeed_config import deepspeed_settings, teacher_settings
from pretrain.engines.guard import StepGuard
from pretrain.engines.zero import (
    Gradients,
    grouped_by_child,
    layer_norms,
    set_parameters,
    total_norms,
    whole_parameters,
)
from pretrain.method.branch import SSLBranch, branch_output
from pretrain.method.outputs import BranchOutput
from pretrain.models.vit import Features, VisionTransformer
from pretrain.optim.groups import set_step_values
from pretrain.optim.schedules import StepValues

SHARED_MEMORY = "deepspeed_shm_comm"  # its name of the extension for CPUs


def start_communication() -> None:
    """Let DeepSpeed use the process group that is running, and compile nothing.

    For CPUs it would build an extension at the first start: a minute, a compiler, and a lock for which later
    runs wait without an end if the build is killed. Only its tensor-parallel inference calls it.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it reports every step that we let it skip
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    __compatible_ops__[SHARED_MEMORY] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


class DeepSpeedEngine:
    """Student, teacher and method under ZeRO; under stage 3 both branches are partitioned alike."""

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
        self.clip_grad_norm = optim.clip_grad_norm
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=engine.precision == "bf16")
        self.guard = StepGuard(optim.spike_factor).to(device)
        self.loss = torch.zeros((), device=device)
        self.good = True
        self.partitioned = engine.deepspeed.stage == 3
        self.plain_backbone = deepcopy(teacher.backbone).to("meta")
        self.gathered_backbone: VisionTransformer | None = None

        settings = deepspeed_settings(optim, engine, world_size())
        self.optimizer = torch.optim.AdamW(
            grouped_by_child(student, optim), lr=0.0, betas=(optim.beta1, optim.beta2), eps=1e-8, fused=True
        )
        self.zero = _initialize(student, settings, self.optimizer)
        self.teacher_zero = _initialize(teacher, teacher_settings(settings)) if self.partitioned else None
        offloaded = engine.deepspeed.offload_optimizer == "cpu"
        self.gradients = Gradients(self.zero.optimizer, engine.deepspeed.stage, offloaded)
        self.unused: set[str] = set()

    def begin_step(self, step: int, values: StepValues) -> None:
        """See `Engine`."""
        self.gathered_backbone = None
        for branch in self.branches.values():
            branch.begin_step(step)
        set_step_values(self.optimizer.param_groups, values)
        self.unused = _unused_heads(self.branches["student"])
        for group in self.optimizer.param_groups:
            if group["child"] in self.unused:
                group["lr"] = (
                    0.0  # other engines pass over what has no gradient; here it is 0, and would decay
                )

    def student(self, batch: Batch) -> BranchOutput:
        """See `Engine`."""
        return branch_output(self.zero(batch))

    @torch.no_grad()
    def teacher(self, batch: Batch) -> BranchOutput:
        """See `Engine`."""
        if self.teacher_zero is not None:
            return branch_output(self.teacher_zero(batch))
        with self.autocast:
            return branch_output(self.branches["teacher"](batch))

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """See `Engine`."""
        with self.autocast:
            features: list[Features] = self.teacher_backbone()([images.to(self.device)])
            return features[0]

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See `Engine`."""
        self.zero.set_gradient_accumulation_boundary(last)
        self.zero.backward(loss, scale_wrt_gas=False)
        self.loss += loss.detach()

    @torch.no_grad()
    def step(self) -> StepResult:
        """See `Engine`; here the host waits for the device."""
        pieces = self.gradients.by_child()
        for child in self.unused & pieces.keys():
            del pieces[child]  # buffers that hold what an earlier step left
        grad_norms = total_norms(pieces, self.device)
        for child, norm in grad_norms.items():
            if self.clip_grad_norm:
                scale = (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
                for piece in pieces[child]:
                    piece.mul_(scale)
        good = self.guard.check(self.loss, grad_norms.values())
        self.good = bool(good)
        if not self.good:
            self.gradients.make_step_skip()
        self.zero.step()
        if not self.good:
            self.gradients.clear()
        self.loss.zero_()
        zeros = {child: torch.zeros((), device=self.device) for child in self.unused}
        return StepResult({**grad_norms, **zeros}, good)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See `Engine`. Each rank averages the partitions it holds; nothing is communicated."""
        if not self.good:
            return
        if self.teacher_zero is not None:  # what a forward left gathered would be used again
            self.teacher_zero.optimizer.partition_all_parameters()
        teacher, student = (self._held(name) for name in ("teacher", "student"))
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    def _held(self, branch: Literal["student", "teacher"]) -> list[Tensor]:
        parameters: Iterable[Any] = self.branches[branch].parameters()
        return [p.ds_tensor for p in parameters] if self.partitioned else list(parameters)

    @torch.no_grad()
    def layer_norms(self) -> dict[str, Tensor]:
        """See `Engine`; a collective call."""
        return layer_norms(self.branches["student"], self.unused, self.device)

    def teacher_backbone(self) -> VisionTransformer:
        """See `Engine`. Under stage 3 a collective call, and a whole copy until the next step begins."""
        if not self.partitioned:
            return self.branches["teacher"].backbone
        if self.gathered_backbone is None:
            whole = dict(whole_parameters(self.branches["teacher"].backbone, partitioned=True))
            backbone = deepcopy(self.plain_backbone)
            backbone.load_state_dict({k: v.to(self.device) for k, v in whole.items()}, assign=True)
            self.gathered_backbone = backbone.requires_grad_(False).eval()
        return self.gathered_backbone

    def bad_steps(self) -> tuple[int, int]:
        """See `Engine`."""
        total, in_a_row = torch.stack([self.guard.bad_steps, self.guard.bad_run]).tolist()
        return int(total), int(in_a_row)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """See `Engine`. Collective; weights are whole on every rank, `optim` is empty: see `save_native`."""
        model: dict[str, Tensor] = {}
        for name, branch in self.branches.items():
            whole = whole_parameters(branch, self.partitioned)
            model |= {f"{name}.{key}": value.detach() for key, value in whole}
        for name, part in (("method", self.method), ("guard", self.guard)):
            model |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        return {"model": model, "optim": {}}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """See `Engine`; the optimizer keeps its own state. A collective call."""
        self.gathered_backbone = None
        model = state["model"]
        for name, branch in self.branches.items():
            values = {k.removeprefix(f"{name}."): v for k, v in model.items() if k.startswith(f"{name}.")}
            set_parameters(branch, values, self.partitioned)
        for name, part in (("method", self.method), ("guard", self.guard)):
            for key, value in part.state_dict().items():
                value.copy_(model[f"{name}.{key}"])
        self.zero.optimizer.refresh_fp32_params()

    def save_native(self, folder: Path) -> None:
        """See `Engine`."""
        save_optimizer(self.zero, folder)

    def load_native(self, folder: Path) -> bool:
        """See `Engine`."""
        return load_optimizer(self.zero, folder, world_size())

    def full_state_dict(self, branch: Literal["student", "teacher"]) -> dict[str, Tensor]:
        """See `Engine`."""
        whole = whole_parameters(self.branches[branch], self.partitioned)
        return {key: value.detach().cpu().clone() for key, value in whole}


def _initialize(
    module: nn.Module, settings: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> Any:
    """DeepSpeed's engine around a module; without an optimizer one that only runs it, partitioned."""
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[
        0
    ]


def _unused_heads(student: SSLBranch) -> set[str]:
    """Trainable heads that randomized ones have replaced at the current step."""
    used = [student.heads("dino").trainable, student.heads("ibot").trainable]
    heads = {name: getattr(student, name) for name in ("dino_head", "ibot_head")}
    return {name for name, head in heads.items() if head is not None and not any(head is u for u in used)}
