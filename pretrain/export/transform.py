"""From one file of weights to another: read, change, write with the origin; nothing is lost silently."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export.folders import open_weights
from pretrain.export.own import (
    CHECKPOINT_FORMAT,
    ENTRY,
    check_name,
    described_model,
    description_text,
    write_export,
    write_tensors,
)
from pretrain.export.provenance import common, with_entry
from pretrain.export.targets import check_free, write_weights
from pretrain.export.weights import Weights, read_weights
from pretrain.surgery.architecture import Settings
from pretrain.surgery.combine import average, cast, vanished
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
    changes = (*weights.changes, *losses(state, model, _target(order)))
    _permit(source, changes, order.allow_loss)
    write_export(
        order.out, state, model, with_entry(weights.about, TOOL, order.arguments, [source], order.stage)
    )
    return Written(model, len(state), changes)


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
    about = with_entry(weights.about, TOOL, order.arguments, [source], order.stage)
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
    lost = losses(read[0].state, read[0].model, _target(order))
    _permit(sources[0], lost, order.allow_loss)
    advance = order.stage("averaging", size(read[0].state))
    state = average([weights.state for weights in read], shares, advance)
    abouts = [weights.about for weights in read]
    about = with_entry(common(abouts), TOOL, order.arguments, sources, order.stage, abouts)
    write_export(order.out, state, read[0].model, about)
    changes = [replace(c, what=f"{w.path}: {c.what}") for w in read for c in w.changes]
    return Written(read[0].model, len(state), (*changes, *lost))


def recast(source: Path, dtype: torch.dtype, order: Order) -> Written:
    """A backbone in another floating-point type.

    Raises:
        InputError: as `transform`, or a value is too large for the type.
    """

    zeros = 0

    def operation(state: State, model: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
        nonlocal zeros
        result = cast(state, dtype, order.stage("casting", size(state)))
        zeros = vanished(state, result)
        return result, model

    done = transform(source, operation, order)
    if not zeros:
        return done
    lost = Change("setting", f"{zeros} values became 0", "they are too small for the type")
    return replace(done, changes=(*done.changes, lost))


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
    if contents.config:
        raise InputError(f"{source}: is a model folder; consolidate takes a sharded checkpoint")
    about = with_entry(contents.description.get("about", {}), TOOL, order.arguments, [source], order.stage)
    if "model" in contents.description:
        model = described_model(source, contents.description["model"])
        text = description_text(model, about, CHECKPOINT_FORMAT)
    else:
        text = json.dumps({"format": CHECKPOINT_FORMAT, "about": about})
    write_tensors(order.out, contents.tensors, {ENTRY: text})
    return len(contents.tensors)


def _target(order: Order) -> Target:
    return "dinov2" if order.out.suffix == ".pth" else "ours"


def _check_out(order: Order) -> None:
    check_name(order.out)
    check_free(order.out, _target(order), order.force)


def _read(source: Path, order: Order) -> Weights:
    weights = read_weights(source, order.branch, order.settings, stage=order.stage)
    _permit(source, weights.changes, order.allow_loss)
    return weights


def _permit(source: Path, changes: Sequence[Change], allowed: bool) -> None:
    lost = [change for change in changes if change.kind == "lost"]
    if lost and not allowed:
        text = "; ".join(f"{change.what} ({change.why})" for change in lost)
        raise InputError(f"{source}: would be lost: {text}. If that is meant: --allow-loss")
