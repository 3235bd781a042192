"""AdamW with DINOv2's groups, and its state by parameter name."""

import torch
from torch import Tensor

from pretrain.config.schema import OptimConfig
from pretrain.method.branch import SSLBranch
from pretrain.optim.groups import parameter_groups


def build_adamw(student: SSLBranch, cfg: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the student's parameter groups, its moments already allocated (zero)."""
    groups = parameter_groups(student.named_parameters(), len(student.backbone.blocks), cfg)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state as `{parameter name}.{moment}`: independent of the grouping and of the engine."""
    return {
        f"{name}.{moment}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for moment, value in optimizer.state[parameter].items()
    }


def step_unless(bad: Tensor, optimizer: torch.optim.AdamW) -> None:
    """One optimizer step; `bad`, a bool scalar on the device, leaves parameters, moments and counts alone.

    The fused kernel reads the flag where a gradient scaler would leave it; nothing waits for the device.
    """
    optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
    optimizer.step()
