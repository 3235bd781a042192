"""Where ZeRO keeps what the engine works on: gradients, and weights in partitions.

Every optimizer group belongs to one sub-module, so a rank's share of a sub-module's gradient is a list of
whole tensors: no parameter needs to be found in a flat buffer. Tested with DeepSpeed 0.19.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from deepspeed import zero
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from pretrain.config.schema import OptimConfig
from pretrain.distributed import all_sum, rank
from pretrain.method.branch import SSLBranch
from pretrain.method.signals import layer_name
from pretrain.optim.groups import parameter_groups

CHUNK = 64  # parameters gathered at once


def grouped_by_child(student: SSLBranch, cfg: OptimConfig) -> list[dict[str, Any]]:
    """The student's parameter groups, each within one sub-module, whose name stands under `child`."""
    children: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in student.named_parameters():
        children[name.split(".")[0]].append((name, parameter))
    depth = len(student.backbone.blocks)
    return [
        {**group, "child": child}
        for child, members in children.items()
        for group in parameter_groups(members, depth, cfg)
    ]


class Gradients:
    """This rank's shares of the averaged gradients, between `backward` and the step of a ZeRO optimizer."""

    def __init__(self, optimizer: Any, stage: int, offloaded: bool) -> None:
        self.optimizer, self.stage, self.offloaded = optimizer, stage, offloaded
        groups: list[dict[str, Any]] = optimizer.optimizer.param_groups
        if stage == 3:  # the groups are cut into pieces
            self.flat = optimizer.fp32_partitioned_groups_flat
            owners = [optimizer.sub_group_to_group_id[i] for i in range(len(self.flat))]
        else:
            self.flat = optimizer.single_partition_of_fp32_groups
            owners = list(range(len(groups)))
        self.children = [groups[i]["child"] for i in owners]

    def by_child(self) -> dict[str, list[Tensor]]:
        """The shares of each sub-module; scaling them scales what the step uses."""
        pieces: dict[str, list[Tensor]] = {child: [] for child in self.children}
        for i, child in enumerate(self.children):
            pieces[child] += [self.flat[i].grad] if self.offloaded else self.optimizer.averaged_gradients[i]
        return pieces

    def make_step_skip(self) -> None:
        """Let the coming step be left out, as a ZeRO optimizer does when gradients are not finite."""
        if self.offloaded:  # judged by norms that were taken when the gradients were copied to the host
            known = self.optimizer.norm_for_param_grads
            known.update(dict.fromkeys(known, torch.tensor(float("nan"))))
            return
        for pieces in self.by_child().values():
            torch._foreach_mul_(pieces, float("nan"))

    def clear(self) -> None:
        """After a step that was left out: buffers that stay hold padding, which nobody would overwrite."""
        if self.offloaded:
            torch._foreach_zero_([flat.grad for flat in self.flat])
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()


def total_norms(pieces: Mapping[str, list[Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Norms over all ranks' shares, by sub-module; one reduction."""
    squares = [
        torch.stack(torch._foreach_norm(tensors)).square().sum().to(device) for tensors in pieces.values()
    ]
    norms = all_sum(torch.stack(squares)).sqrt() if squares else torch.zeros(0, device=device)
    return dict(zip(pieces, norms.unbind(), strict=True))


def layer_norms(student: nn.Module, unused: set[str], device: torch.device) -> dict[str, Tensor]:
    """Norms of weights and gradients per layer, named as by `method.signals.norms`; one reduction.

    Args:
        student: between `backward` and the step.
        unused: sub-modules without a gradient in this step.
        device: of the result.
    """
    squares: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        weight, gradient = _shares(parameter)
        unit = layer_name(name)
        found = {f"weight_norm/{unit}": weight}
        if name.split(".")[0] not in unused:
            found[f"gradient_norm/{unit}"] = gradient
        for key, share in found.items():
            square = share.float().square().sum().to(device)
            squares[key] = squares[key] + square if key in squares else square
    total = all_sum(torch.stack(list(squares.values()))).sqrt()
    return dict(zip(squares, total.unbind(), strict=True))


def _shares(parameter: Any) -> tuple[Tensor, Tensor]:
    """What this rank holds of a parameter and of its gradient, flat; empty where it holds nothing."""
    if hasattr(parameter, "ds_tensor"):
        size = parameter.ds_tensor.numel()  # the last shares may be padding
        real = min(max(parameter.ds_numel - rank() * size, 0), size)
        return parameter.ds_tensor.flatten()[:real], safe_get_local_grad(parameter).flatten()[:real]
    held = parameter._hp_mapping
    if held is None:
        return torch.zeros(0), torch.zeros(0)
    return held.get_hp_fragment(), held.get_lp_grad_fragment(parameter._index_in_param_group)


def whole_parameters(module: nn.Module, partitioned: bool) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a module in its whole shape; a collective call when they are partitioned.

    Yields:
        The parameter itself, or a copy on the CPU of a partitioned one.
    """
    if not partitioned:
        yield from module.named_parameters()
        return
    for chunk in _chunks(module.named_parameters()):
        with zero.GatheredParameters([parameter for _, parameter in chunk]):
            copies = [(name, parameter.detach().cpu().clone()) for name, parameter in chunk]
        yield from copies


@torch.no_grad()
def set_parameters(module: nn.Module, values: Mapping[str, Tensor], partitioned: bool) -> None:
    """Overwrite every parameter of a module with a whole tensor; collective when they are partitioned."""
    for chunk in _chunks(module.named_parameters()):
        parameters = [parameter for _, parameter in chunk]
        # without modifier_rank what is written here would be dropped without a word
        with zero.GatheredParameters(parameters, modifier_rank=0, enabled=partitioned):
            for name, parameter in chunk:
                parameter.copy_(values[name])


def _chunks(
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    rest = iter(parameters)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk
