"""Which backbone a state dict is of: everything that its names and shapes tell."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from pretrain.config.derived import ARCHITECTURES, ffn_hidden_dim
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer
from pretrain.surgery.layouts import Layout, State

HEAD_DIM = 64  # of every released model
SHOWN = 3  # names in an error line


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

    def shape(ours: str) -> tuple[int, ...]:
        part, *others = layout.names(ours)
        if part not in state:
            raise InputError(f"the tensor {part} is missing; is the file complete?")
        first, *rest = state[part].shape
        return (first * (1 + len(others)), *rest)

    dim, channels, patch, width = shape("patch_embed.proj.weight")
    if patch != width:
        raise InputError(f"patches of {patch} x {width} px; only square patches are supported")
    tokens = shape("pos_embed")[1] - 1
    rows, columns = settings.grid or _square(tokens)
    registers = shape("register_tokens")[1] if layout.names("register_tokens")[0] in state else 0
    heads = settings.num_heads or _conventional_heads(dim)
    offset, antialias = settings.pos_embed_offset, settings.pos_embed_antialias
    depth = _depth(state, layout)
    model = ModelConfig(
        patch_size=patch,
        img_size=rows * patch,
        img_width=None if rows == columns else columns * patch,
        in_channels=channels,
        num_register_tokens=registers,
        layer_scale=1.0 if layout.names("blocks.0.ls1.gamma")[0] in state else None,
        drop_path_rate=0.0,
        pos_embed_offset=offset if offset is not None else 0.0 if registers else 0.1,
        pos_embed_antialias=antialias if antialias is not None else registers > 0,
        **_named(dim, depth, heads),
    )
    kind, hidden = _ffn(shape, state, layout)
    return _with_ffn(model, dim, kind, hidden)


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
    numbers = re.compile(re.escape(layout.blocks) + r"(\d+)\.")
    return 1 + max((int(m[1]) for m in map(numbers.match, state) if m), default=-1)


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
        first, second = shape("blocks.0.mlp.w12.weight")[0], shape("blocks.0.mlp.w3.weight")[1]
        if first == 2 * second:
            return "swiglu", second
    return "mlp", shape("blocks.0.mlp.fc1.weight")[0]


def _with_ffn(model: ModelConfig, dim: int, kind: Literal["mlp", "swiglu"], hidden: int) -> ModelConfig:
    """The model with the ratio that gives this hidden width: 4 where it does."""
    wide = hidden * 3 // 2 if kind == "swiglu" else hidden
    for ratio in (4.0, wide / dim, (wide + 0.5) / dim):
        found = replace(model, ffn_layer=kind, ffn_ratio=ratio)
        if ffn_hidden_dim(found) == hidden:
            return found
    raise InputError(f"a SwiGLU layer of width {hidden}; only multiples of 8 are supported")
