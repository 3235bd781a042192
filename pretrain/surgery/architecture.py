"""Which backbone a state dict is of: everything that its names and shapes tell."""

import math
import re
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import torch

from pretrain.config.derived import ARCHITECTURES, ffn_hidden_dim, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer
from pretrain.surgery.layouts import Layout, State

HEAD_DIM = 64  # of every released model
SHOWN = 3  # names in an error line
LARGEST = 100_000  # of any size: beyond it a section is damaged


@dataclass(frozen=True)
class Settings:
    """What weights do not tell; None = by convention."""

    num_heads: int | None = None  # 64 channels a head
    pos_embed_offset: float | None = None  # 0.1, or 0.0 with registers, as in the released models
    pos_embed_antialias: bool | None = None  # false, or true with registers
    grid: tuple[int, int] | None = None  # rows and columns of the positions; square


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a backbone, ours."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in VisionTransformer(model).state_dict().items()}


def infer_model(state: State, layout: Layout, settings: Settings) -> ModelConfig:
    """The model section that builds a state dict's backbone.

    Args:
        state: a layout's names without prefix or chunks, class positions not folded.
        layout: of the state dict.
        settings: what the names and shapes do not tell.

    Raises:
        InputError: it is no backbone of this kind, or one that the model section cannot describe.
    """

    def shape(ours: str, dimensions: int) -> tuple[int, ...]:
        part, *others = layout.names(ours)
        if part not in state:
            raise InputError(f"the tensor {part} is missing; is the file complete?")
        found = tuple(state[part].shape)
        if len(found) != dimensions or 0 in found:
            raise InputError(f"{part} is {found}: not a tensor of {dimensions} dimensions")
        return (found[0] * (1 + len(others)), *found[1:])

    dim, channels, patch, width = shape("patch_embed.proj.weight", 4)
    if patch != width:
        raise InputError(f"patches of {patch} x {width} px; only square patches are supported")
    tokens = shape("pos_embed", 3)[1] - 1
    rows, columns = settings.grid or _square(tokens)
    registers = shape("register_tokens", 3)[1] if layout.names("register_tokens")[0] in state else 0
    heads = _conventional_heads(dim) if settings.num_heads is None else settings.num_heads
    offset, antialias = settings.pos_embed_offset, settings.pos_embed_antialias
    conventional = layout.interpolation or ((0.0, True) if registers else (0.1, False))
    depth = _depth(state, layout)
    model = ModelConfig(
        patch_size=patch,
        img_size=rows * patch,
        img_width=None if rows == columns else columns * patch,
        in_channels=channels,
        num_register_tokens=registers,
        layer_scale=1.0 if layout.names("blocks.0.ls1.gamma")[0] in state else None,
        drop_path_rate=0.0,
        pos_embed_offset=offset if offset is not None else conventional[0],
        pos_embed_antialias=antialias if antialias is not None else conventional[1],
        **_named(dim, depth, heads),
    )
    kind, hidden = _ffn(shape, state, layout)
    model = _with_ffn(model, dim, kind, hidden)
    check_section(model)
    return model


def check_section(model: ModelConfig) -> None:
    """Refuse a model section that describes no model.

    Raises:
        InputError: a number is out of its range, heads do not divide the width, or a register neuron is not
            in the model or there twice.
    """
    dim, depth, heads = vit_shape(model)
    width = model.img_size if model.img_width is None else model.img_width
    sizes = {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "patch_size": model.patch_size,
        "img_size": model.img_size,
        "img_width": width,
        "in_channels": model.in_channels,
        "num_register_tokens": model.num_register_tokens + 1,
    }
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise InputError(f"{name}={value} must be a number from 1 to {LARGEST}")
    if dim % heads:
        raise InputError(f"{heads} heads do not divide width {dim}; give the right number with --num-heads")
    if model.img_size % model.patch_size or width % model.patch_size:
        raise InputError(
            f"img_size={model.img_size} x {width} is no multiple of patch_size={model.patch_size}"
        )
    if not 0 < model.ffn_ratio <= LARGEST:
        raise InputError(f"ffn_ratio={model.ffn_ratio} must be above 0")
    if not 0 <= model.pos_embed_offset < 1:
        raise InputError(f"the position offset {model.pos_embed_offset} must be from 0 to below 1")
    _check_register_neurons(model)


def _check_register_neurons(model: ModelConfig) -> None:
    depth, hidden = vit_shape(model).depth, ffn_hidden_dim(model)
    seen: set[tuple[int, ...]] = set()
    for pair in model.register_neurons:
        if len(pair) != 2 or not (0 <= pair[0] < depth and 0 <= pair[1] < hidden):
            raise InputError(
                f"register_neurons: {pair} is no pair of a block from 0 to {depth - 1} and a hidden unit "
                f"from 0 to {hidden - 1}"
            )
        if tuple(pair) in seen:
            raise InputError(f"register_neurons: {pair} is there more than once")
        seen.add(tuple(pair))


def check_complete(state: State, model: ModelConfig) -> None:
    """Refuse a state dict (our names) that is not exactly the model's.

    Raises:
        InputError: tensors are missing, not expected or of another shape; how many of each, and which.
    """
    wanted = shapes(model)
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    other = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    kinds = {"missing": missing, "not expected": extra, "of another shape": other}
    faults = [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names]
    if faults:
        raise InputError(f"of the model's {len(wanted)} tensors: {'; '.join(faults)}")


def listed(names: list[str]) -> str:
    """The first few names, for a line."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _square(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise InputError(f"{tokens} position embeddings are no square grid; give its --grid ROWSxCOLUMNS")
    return side, side


def _depth(state: State, layout: Layout) -> int:
    """Blocks from 0 on without a gap: what comes after one is not expected."""
    numbers = re.compile(re.escape(layout.blocks) + r"(\d+)\.")
    found = {int(match[1]) for match in map(numbers.match, state) if match}
    return next(number for number in count() if number not in found)


def _conventional_heads(dim: int) -> int:
    if dim % HEAD_DIM:
        raise InputError(
            f"the number of attention heads is in no weight, and width {dim} is no multiple of {HEAD_DIM}; "
            "give it with --num-heads"
        )
    return dim // HEAD_DIM


def _named(dim: int, depth: int, heads: int) -> dict[str, Any]:
    for name, numbers in ARCHITECTURES.items():
        if numbers == (dim, depth, heads):
            return {"arch": name}
    return {"arch": "custom", "embed_dim": dim, "depth": depth, "num_heads": heads}


def _ffn(shape: Any, state: State, layout: Layout) -> tuple[Literal["mlp", "swiglu"], int]:
    """Kind and hidden width. timm names both kinds alike: SwiGLU's first layer is twice as wide."""
    if layout.names("blocks.0.mlp.w12.weight")[0] in state:
        first, second = shape("blocks.0.mlp.w12.weight", 2)[0], shape("blocks.0.mlp.w3.weight", 2)[1]
        if first == 2 * second:
            return "swiglu", second
    return "mlp", shape("blocks.0.mlp.fc1.weight", 2)[0]


def _with_ffn(model: ModelConfig, dim: int, kind: Literal["mlp", "swiglu"], hidden: int) -> ModelConfig:
    """The model with the ratio that gives this hidden width: 4 where it does."""
    wide = hidden * 3 // 2 if kind == "swiglu" else hidden
    for ratio in (4.0, *map(float, range(1, 17)), wide / dim, (wide + 0.5) / dim):
        found = replace(model, ffn_layer=kind, ffn_ratio=ratio)
        if ffn_hidden_dim(found) == hidden:
            return found
    raise InputError(f"a SwiGLU layer of width {hidden}; only multiples of 8 are supported")
