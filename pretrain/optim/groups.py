"""DINOv2's parameter groups: layer-wise learning rates, no decay of biases and norms, frozen parts."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from pretrain.config.schema import OptimConfig
from pretrain.optim.schedules import StepValues


class GroupKey(NamedTuple):
    """What the parameters of one group have in common."""

    lr_mult: float
    wd_mult: float
    is_last_layer: bool
    is_backbone: bool


def group_key(name: str, depth: int, cfg: OptimConfig) -> GroupKey:
    """The group of a parameter of the student, by its name.

    Embeddings, class, mask and register tokens are layer 0, block i is layer i + 1, the final norm depth + 1;
    a layer's factor is decay^(depth + 1 - layer). Heads keep the full rate. Biases, norms and LayerScale are
    not decayed.
    """
    lr_mult, is_backbone = 1.0, name.startswith("backbone.")
    if is_backbone:
        lr_mult = cfg.layerwise_decay ** (depth + 1 - _layer(name.removeprefix("backbone."), depth))
    if "patch_embed" in name:
        lr_mult *= cfg.patch_embed_lr_mult
    decayed = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return GroupKey(lr_mult, float(decayed), "last_layer" in name, is_backbone)


def _layer(name: str, depth: int) -> int:
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith("norm.") else 0


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], depth: int, cfg: OptimConfig
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, in a fixed order, each with its factors, names and parameters."""
    groups: dict[GroupKey, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in parameters:
        groups[group_key(name, depth, cfg)].append((name, parameter))
    return [
        {"params": [p for _, p in members], "names": [n for n, _ in members], **key._asdict()}
        for key, members in groups.items()
    ]


def set_step_values(groups: list[dict[str, Any]], values: StepValues) -> None:
    """Write a step's learning rate and weight decay into the groups.

    A rate of 0 freezes a group to the bit: AdamW's decay is multiplied by it too. Its moments go on.
    """
    for group in groups:
        lr = values.backbone_lr if group["is_backbone"] else values.lr
        group["lr"] = group["lr_mult"] * (values.last_layer_lr if group["is_last_layer"] else lr)
        group["weight_decay"] = group["wd_mult"] * values.weight_decay
