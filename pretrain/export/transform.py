"""From one file of weights to another: read, change, write with the origin; nothing is lost silently."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export.folders import open_weights
from pretrain.export.own import check_name, described_model, write_export, write_tensors
from pretrain.export.provenance import with_entry
from pretrain.export.targets import check_free, write_weights
from pretrain.export.weights import Weights, read_weights
from pretrain.surgery.architecture import Settings
from pretrain.surgery.combine import average, cast
from pretrain.surgery.compare import model_differences
from pretrain.surgery.conversion import Change, Target, losses
from pretrain.surgery.layouts import DEFAULT_CHUNKS, State
from pretrain.surgery.progress import Stage, silent, size

TOOL = "surgery"
Operation = Callable[[State, ModelConfig], tuple[dict[str, Tensor], ModelConfig]]


@dataclass(frozen=True)
class Order:
    """What every verb that writes is told."""

    out: Path
    arguments: Sequence[str] = ()  # the command line, for the record of the origin
    branch: str | None = None  # `student` or `teacher`, where a source has both
    settings: Settings | None = None  # what a source does not tell
    force: bool = False  # replace what is at `out`
    allow_loss: bool = False
    stage: Stage = silent


@dataclass(frozen=True)
class Written:
    """What a verb did."""

    model: ModelConfig
    tensors: int
    changes: tuple[Change, ...]


def transform(source: Path, operation: Operation, order: Order) -> Written:
    """Read a backbone, change it, and write it as an export (or as a .pth file, by the name).

    Raises:
        InputError: the source, the operation or the target is wrong, or something would be lost.
    """
    _check_out(order)
    weights = _read(source, order)
    state, model = operation(weights.state, weights.model)
    write_export(order.out, state, model, _about(weights, [source], order))
    return Written(model, len(state), weights.changes)


def convert(
    source: Path, target: Target, order: Order, chunks: int = DEFAULT_CHUNKS, split_swiglu: bool = False
) -> Written:
    """Write a backbone in another format.

    Raises:
        InputError: the source or the target is wrong, or something would be lost.
    """
    check_free(order.out, target, order.force)
    weights = _read(source, order)
    changes = (*weights.changes, *losses(weights.state, weights.model, target))
    _permit(source, changes, order.allow_loss)
    about = _about(weights, [source], order)
    write_weights(order.out, target, weights.state, weights.model, about, chunks, split_swiglu)
    return Written(weights.model, len(weights.state), changes)


def combine(
    sources: Sequence[Path], shares: Sequence[float], order: Order, ascending: bool = False
) -> Written:
    """The weighted average of several backbones of one architecture.

    Args:
        sources: the first gives dtypes and settings.
        shares: one a source; the sum does not matter.
        order: what to write.
        ascending: refuse sources whose steps, as far as they tell them, do not rise.

    Raises:
        InputError: a source or the target is wrong, or the architectures differ.
    """
    _check_out(order)
    read = [_read(source, order) for source in sources]
    for other in read[1:]:
        differing = model_differences(read[0].model, other.model)
        if differing:
            raise InputError(f"{other.path}: another model than {read[0].path}: {'; '.join(differing[:3])}")
    steps = [weights.about["step"] for weights in read if "step" in weights.about]
    if ascending and steps != sorted(steps):
        raise InputError(f"the oldest file comes first, these are of the steps {steps}")
    advance = order.stage("averaging", size(read[0].state))
    state = average([weights.state for weights in read], shares, advance)
    write_export(order.out, state, read[0].model, _about(read[0], sources, order))
    return Written(read[0].model, len(state), read[0].changes)


def recast(source: Path, dtype: torch.dtype, order: Order) -> Written:
    """A backbone in another floating-point type.

    Raises:
        InputError: as `transform`, or a value is too large for the type.
    """

    def operation(state: State, model: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
        return cast(state, dtype, order.stage("casting", size(state))), model

    return transform(source, operation, order)


def consolidate(source: Path, order: Order) -> int:
    """Write every tensor of a sharded checkpoint into one safetensors file: heads and both branches too.

    Returns:
        The number of tensors.

    Raises:
        InputError: the source is not a complete checkpoint, or the target is wrong.
    """
    _check_out(order)
    if order.out.suffix != ".safetensors":
        raise InputError(f"--out {order.out}: consolidate writes a .safetensors file; name it so")
    if not source.is_dir():
        raise InputError(f"{source}: is not a folder; consolidate takes a sharded checkpoint")
    contents = open_weights(source)
    about = with_entry(contents.description.get("about", {}), TOOL, order.arguments, [source], order.stage)
    if "model" in contents.description:
        write_export(
            order.out, contents.tensors, described_model(source, contents.description["model"]), about
        )
    else:
        write_tensors(order.out, contents.tensors, {"about": json.dumps(about)})
    return len(contents.tensors)


def _check_out(order: Order) -> None:
    check_name(order.out)
    check_free(order.out, "ours" if order.out.suffix == ".safetensors" else "dinov2", order.force)


def _read(source: Path, order: Order) -> Weights:
    weights = read_weights(source, order.branch, order.settings, stage=order.stage)
    _permit(source, weights.changes, order.allow_loss)
    return weights


def _permit(source: Path, changes: Sequence[Change], allowed: bool) -> None:
    lost = [change for change in changes if change.kind == "lost"]
    if lost and not allowed:
        text = "; ".join(f"{change.what} ({change.why})" for change in lost)
        raise InputError(f"{source}: would be lost: {text}. If that is meant: --allow-loss")


def _about(weights: Weights, sources: Sequence[Path], order: Order) -> dict[str, object]:
    return with_entry(weights.about, TOOL, order.arguments, sources, order.stage)
