"""From any layout to ours and back, with a list of everything that does not stay as it was."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pretrain.config.derived import position_grid, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.surgery.architecture import Settings, check_complete, check_section, infer_model, listed, shapes
from pretrain.surgery.folding import fold_class_position, unfold_class_position
from pretrain.surgery.layouts import (
    DEFAULT_CHUNKS,
    DINOV2,
    DINOV2_SPLIT,
    HUGGING_FACE,
    TIMM,
    State,
    chunked,
    from_ours,
    to_ours,
)
from pretrain.surgery.recognition import Found, find_backbone

Target = Literal["ours", "dinov2", "dinov2-chunked", "huggingface", "timm"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Change:
    """One thing that a conversion does not leave as it was."""

    kind: Literal["lost", "added", "setting", "left out"]  # only `lost` needs a permission
    what: str
    why: str


@dataclass(frozen=True)
class Form:
    """A format with its variants: what `write_layout` needs to write a backbone as it was found."""

    target: Target
    chunks: int = DEFAULT_CHUNKS
    split_swiglu: bool = False


@dataclass(frozen=True)
class Backbone:
    """A backbone in our form, and what was found out about its source."""

    state: dict[str, Tensor]
    model: ModelConfig
    layout: str  # of the source, with its prefix and chunks
    form: Form  # of the source
    changes: tuple[Change, ...] = ()


def read_backbone(
    state: State,
    branch: str | None = None,
    settings: Settings | None = None,
    described: ModelConfig | None = None,
) -> Backbone:
    """A backbone in our form from the flat state dict of any format.

    Args:
        state: as read from the file; tensors are taken over, not copied, where the layouts agree.
        branch: `student` or `teacher` where the file has several; None = the teacher's.
        settings: what weights do not tell; wins over `described`.
        described: the model section that travelled with the file.

    Raises:
        InputError: no backbone, an incomplete one, one of an unsupported kind, or not that of `described`.
    """
    settings = settings or Settings()
    grid = settings.grid or (position_grid(described) if described else None)
    found = _unfolded(find_backbone(state, branch), grid)
    _check_types(found.state)
    if described is None:
        model = infer_model(found.state, found.layout, settings)
    else:
        model = _with_settings(described, settings)
        check_section(model)
    ours = to_ours(found.state, found.layout, list(shapes(model)))
    filled, changes = _filled(ours, found)
    check_complete(filled, model)
    unused = _unused(found, model) + found.others
    if unused:
        why = "no part of a backbone"
        changes.append(Change("lost", f"{len(unused)} tensors: {listed(unused)}", why))
    changes += [Change("left out", part, f"{n} tensors of pretraining") for part, n in found.left_out.items()]
    return Backbone(filled, model, _title(found), _form(found), tuple(changes))


def write_layout(
    state: State, model: ModelConfig, target: Target, chunks: int, split_swiglu: bool = False
) -> dict[str, Tensor]:
    """A backbone of ours under the names of a target format; see `losses` for what is not in it.

    Args:
        state: ours.
        model: of the state.
        target: the format.
        chunks: of dinov2-chunked.
        split_swiglu: for the dinov2 formats: gate and value as w1 and w2 instead of one w12.
    """
    match target:
        case "ours":
            return dict(state)
        case "dinov2" | "dinov2-chunked":
            renamed = from_ours(state, DINOV2_SPLIT if split_swiglu else DINOV2)
            return chunked(renamed, vit_shape(model).depth, chunks) if target == "dinov2-chunked" else renamed
        case "huggingface":
            return from_ours({**state, **_missing_scales(state, model)}, HUGGING_FACE)
        case "timm":
            return from_ours(fold_class_position(state) if model.num_register_tokens else state, TIMM)


def losses(state: State, model: ModelConfig, target: Target) -> list[Change]:
    """What a target format cannot hold of a backbone, and what it adds.

    Raises:
        InputError: the format has no such model at all.
    """
    _check_possible(model, target)
    changes: list[Change] = []
    if model.register_neurons and target != "ours":
        text = f"the test-time register and its {len(model.register_neurons)} neurons"
        changes.append(
            Change("lost", text, "other programs know none; our description beside the weights keeps it")
        )
    if target == "timm":
        changes += _timm_losses(state, model)
    if target == "huggingface" and model.layer_scale is None:
        changes.append(
            Change("added", "LayerScale factors of 1 in every block", "the format always has them")
        )
    here = (model.pos_embed_offset, model.pos_embed_antialias)
    there = target_interpolation(model, target)
    if there not in (None, here):
        text = f"position interpolation: {_interpolation(here)} becomes {_interpolation(there or here)}"
        changes.append(Change("setting", text, "other features at other image sizes than the grid's"))
    return changes


def _interpolation(settings: tuple[float, bool]) -> str:
    return f"offset {settings[0]:g} {'with' if settings[1] else 'without'} antialias"


def target_interpolation(model: ModelConfig, target: Target) -> tuple[float, bool] | None:
    """Offset and antialias that a format's own code uses; None = it keeps the model's."""
    registers = model.num_register_tokens > 0
    match target:
        case "ours":
            return None
        case "dinov2" | "dinov2-chunked":  # by its hub's functions
            return (0.0, True) if registers else (0.1, False)
        case "huggingface":
            return 0.0, registers
        case "timm":
            return 0.0, True


def _check_possible(model: ModelConfig, target: Target) -> None:
    rows, columns = position_grid(model)
    if rows != columns and target in ("dinov2", "dinov2-chunked", "huggingface"):
        raise InputError(
            f"--to {target}: has square position grids only, this one is {rows} x {columns}; "
            "interpolate it to a square image size first"
        )
    if target == "huggingface" and model.ffn_ratio != int(model.ffn_ratio):
        raise InputError(
            f"--to huggingface: has whole feed-forward ratios only, this model's is {model.ffn_ratio:g}"
        )


def _timm_losses(state: State, model: ModelConfig) -> list[Change]:
    changes = []
    if state["mask_token"].any():
        changes.append(Change("lost", "mask_token", "timm's model has none; only masked pretraining uses it"))
    if model.num_register_tokens and state["pos_embed"][:, 0].any():
        why = "timm stores one sum of both; the features stay the same"
        changes.append(Change("lost", "cls_token and its position as two tensors", why))
        dtype = state["cls_token"].dtype
        if dtype in (torch.bfloat16, torch.float16):
            kind = str(dtype).removeprefix("torch.")
            changes.append(
                Change("lost", "digits of that sum", f"it is rounded to {kind}; cast to float32 first")
            )
    return changes


def _unfolded(found: Found, grid: tuple[int, int] | None) -> Found:
    """timm keeps no class position beside registers (no_embed_class).

    Args:
        found: in any layout.
        grid: of the positions, where it is known; else a square.
    """
    if found.layout is not TIMM or not {"reg_token", "pos_embed"} <= found.state.keys():
        return found
    if found.state["pos_embed"].ndim != 3:
        return found  # refused where shapes are read
    positions = found.state["pos_embed"].shape[1]
    patches = math.prod(grid) if grid else math.isqrt(positions) ** 2
    if positions != patches:
        raise InputError(
            f"{positions} positions are not those of patches alone: a timm model whose class token and "
            "registers have positions (no_embed_class=False) is not supported"
        )
    return replace(found, state=unfold_class_position(found.state))


def _check_types(state: State) -> None:
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{name} is {kind}; write it as float32, bfloat16 or float16 where it was made")


def _with_settings(model: ModelConfig, settings: Settings) -> ModelConfig:
    if settings.num_heads is not None:
        dim, depth, _ = vit_shape(model)
        model = replace(model, arch="custom", embed_dim=dim, depth=depth, num_heads=settings.num_heads)
    if settings.grid:
        rows, columns = (n * model.patch_size for n in settings.grid)
        model = replace(model, img_size=rows, img_width=None if rows == columns else columns)
    if settings.pos_embed_offset is not None:
        model = replace(model, pos_embed_offset=settings.pos_embed_offset)
    if settings.pos_embed_antialias is not None:
        model = replace(model, pos_embed_antialias=settings.pos_embed_antialias)
    return model


def _filled(ours: dict[str, Tensor], found: Found) -> tuple[dict[str, Tensor], list[Change]]:
    """What our form has and a layout may lack."""
    changes = []
    if "mask_token" not in ours and "cls_token" in ours:
        ours["mask_token"] = torch.zeros_like(ours["cls_token"][0])
        changes.append(Change("added", "mask_token of zeros", f"{found.layout.title} weights without one"))
    return ours, changes


def _unused(found: Found, model: ModelConfig) -> list[str]:
    """Names that no tensor of ours took; LayerScale factors of 1 that our model does without are no loss."""
    taken = {their for name in shapes(model) for their in found.layout.names(name)}
    spare = {t for i in range(vit_shape(model).depth) for n in _scales(i) for t in found.layout.names(n)}
    return [
        name
        for name, tensor in found.state.items()
        if name not in taken and not (name in spare and bool((tensor == 1).all()))
    ]


def _scales(block: int) -> tuple[str, str]:
    return f"blocks.{block}.ls1.gamma", f"blocks.{block}.ls2.gamma"


def _missing_scales(state: State, model: ModelConfig) -> Mapping[str, Tensor]:
    if model.layer_scale is not None:
        return {}
    shape = vit_shape(model)
    ones = torch.ones(shape.embed_dim, dtype=state["norm.weight"].dtype)
    return {name: ones.clone() for block in range(shape.depth) for name in _scales(block)}


def _form(found: Found) -> Form:
    if found.layout is TIMM:
        return Form("timm")
    if found.layout not in (DINOV2, DINOV2_SPLIT):
        return Form("huggingface")
    target: Target = "dinov2-chunked" if found.chunks else "dinov2"
    return Form(target, found.chunks or DEFAULT_CHUNKS, found.layout is DINOV2_SPLIT)


def _title(found: Found) -> str:
    chunks = ", block chunks" if found.chunks else ""
    prefix = f" below {found.prefix.rstrip('.')}" if found.prefix else ""
    return f"{found.layout.title}{chunks}{prefix}"
