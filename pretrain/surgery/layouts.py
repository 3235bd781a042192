"""How formats name the tensors of a backbone: one table per layout, read in both directions.

Our names are those of the released DINOv2 weights. A layout may hold one of our tensors as several (q, k and
v apart), which are ours cut along dimension 0; so a conversion moves values and computes none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.errors import InputError

State = Mapping[str, Tensor]
Names = Mapping[str, tuple[str, ...]]  # ours (a tensor, or all below it) -> theirs

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.(.+)")  # blocks.{chunk}.{block}: DINOv2's training checkpoints
DEFAULT_CHUNKS = 4  # of DINOv2's own configurations


@dataclass(frozen=True)
class Layout:
    """The names of one format where they differ from ours."""

    title: str
    blocks: str = "blocks."  # what stands before the block's number
    outside: Names = field(default_factory=dict)
    inside: Names = field(default_factory=dict)  # below a block
    interpolation: tuple[float, bool] | None = (
        None  # offset and antialias of its program; None = by registers
    )

    def names(self, ours: str) -> tuple[str, ...]:
        """Where this layout keeps one of our tensors; none = nowhere."""
        match = BLOCK.fullmatch(ours)
        if match is None:
            return _renamed(self.outside, ours)
        return tuple(f"{self.blocks}{match[1]}.{name}" for name in _renamed(self.inside, match[2]))


def _renamed(table: Names, name: str) -> tuple[str, ...]:
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return tuple(their + name.removeprefix(ours) for their in theirs)
    return (name,)


_HUGGING_FACE = {
    "cls_token": ("embeddings.cls_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "register_tokens": ("embeddings.register_tokens",),
    "mask_token": ("embeddings.mask_token",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
}
_HUGGING_FACE_SCALES = {"ls1.gamma": ("layer_scale1.lambda1",), "ls2.gamma": ("layer_scale2.lambda1",)}

DINOV2 = Layout("DINOv2")
DINOV2_SPLIT = Layout(
    "DINOv2, gate and value apart", inside={"mlp.w12": ("mlp.w1", "mlp.w2"), "mlp.w3": ("mlp.w3",)}
)
HUGGING_FACE = Layout(
    "Hugging Face",
    "encoder.layer.",
    _HUGGING_FACE,
    {
        "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        "attn.proj": ("attention.output.dense",),
        "mlp.w12": ("mlp.weights_in",),
        "mlp.w3": ("mlp.weights_out",),
        **_HUGGING_FACE_SCALES,
    },
)
HUGGING_FACE_MODULES = Layout(  # the state dict of a model in memory since transformers 5
    "Hugging Face, module names",
    "encoder.layer.",
    _HUGGING_FACE,
    {
        "attn.qkv": tuple(f"attention.{part}_proj" for part in ("q", "k", "v")),
        "attn.proj": ("attention.o_proj",),
        "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.w3": ("mlp.down_proj",),
        **_HUGGING_FACE_SCALES,
    },
)
TIMM = Layout(  # positions and class token: see folding.py
    "timm",
    outside={"register_tokens": ("reg_token",), "mask_token": ()},
    inside={"mlp.w12": ("mlp.fc1",), "mlp.w3": ("mlp.fc2",)},
    interpolation=(0.0, True),
)


def from_ours(state: State, layout: Layout) -> dict[str, Tensor]:
    """Our state dict under a layout's names; the tensors are views."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = layout.names(name)
        if theirs:
            renamed.update(zip(theirs, tensor.chunk(len(theirs)), strict=True))
    return renamed


def to_ours(state: State, layout: Layout, wanted: list[str]) -> dict[str, Tensor]:
    """The wanted ones of our tensors, those that the layout's state dict holds whole."""
    found: dict[str, Tensor] = {}
    for name in wanted:
        parts = [state[their] for their in layout.names(name) if their in state]
        if parts and len(parts) == len(layout.names(name)):
            found[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found


def chunked(state: State, depth: int, chunks: int) -> dict[str, Tensor]:
    """Block names with the chunk before the number: blocks.5 becomes blocks.1.5 (two chunks of four).

    A chunk holds depth // chunks blocks, a rest makes one more chunk.

    Raises:
        InputError: there are fewer blocks than chunks, or no chunks.
    """
    if not 1 <= chunks <= depth:
        raise InputError(f"--chunks: {chunks} must be between 1 and the {depth} blocks")
    size = depth // chunks
    return {
        BLOCK.sub(lambda m: f"blocks.{int(m[1]) // size}.{m[1]}.{m[2]}", name): tensor
        for name, tensor in state.items()
    }


def unchunked(state: State) -> dict[str, Tensor]:
    """The inverse of `chunked`; other names stay."""
    return {CHUNKED.sub(r"blocks.\1.\2", name): tensor for name, tensor in state.items()}
