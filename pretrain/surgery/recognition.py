"""Finds the backbone in a flat state dict: under which prefix, in which layout, and what else is there."""

import re
from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from pretrain.errors import InputError
from pretrain.surgery.architecture import listed
from pretrain.surgery.layouts import (
    CHUNKED,
    DINOV2,
    DINOV2_SPLIT,
    HUGGING_FACE,
    HUGGING_FACE_MODULES,
    TIMM,
    Layout,
    State,
    unchunked,
)

PATCH_EMBEDDINGS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
# parts of a training checkpoint that no backbone has: left out, and said
PRETRAINING = re.compile(
    r"(.*\.)?(dino_head|ibot_head|dino_loss|ibot_patch_loss|ibot_loss|koleo_loss|gram_teacher|optimizer|optim|"
    r"optimizer_states|lr_schedulers?|callbacks|loops|method|student|teacher)\..*"
)


@dataclass(frozen=True)
class Found:
    """A backbone's tensors under the names of its layout, and what was left out."""

    state: dict[str, Tensor]  # prefix and chunks removed
    layout: Layout
    prefix: str
    chunks: int  # number of block chunks; 0 = block names had no chunk number
    left_out: dict[str, int]  # parts of a training checkpoint: number of tensors
    others: list[str]  # names that belong to nothing known


def find_backbone(state: State, branch: str | None) -> Found:
    """The backbone in a state dict.

    Args:
        state: flat, as read from the file.
        branch: `student` or `teacher` where there are several; None = the teacher's.

    Raises:
        InputError: there is none, or none of that branch, or several that nothing tells apart.
    """
    prefix = _choose(_prefixes(state), branch, state)
    inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    outside = [name for name in state if not name.startswith(prefix)]
    chunks = _chunks(inside)
    inside = unchunked(inside) if chunks else inside
    layout = _layout(inside)
    whole = bool({"student", "teacher"} & set(prefix.split(".")))  # so everything else is of the training
    training = [name for name in inside if PRETRAINING.fullmatch(name)]
    training += [name for name in outside if whole or PRETRAINING.fullmatch(name)]
    state = {name: tensor for name, tensor in inside.items() if not PRETRAINING.fullmatch(name)}
    others = [name for name in outside if name not in training]
    return Found(state, layout, prefix, chunks, dict(Counter(map(_part, training))), others)


def _chunks(state: State) -> int:
    """Number of chunks, as `chunked` counts them: a rest is not one."""
    blocks = {match[1]: match[0] for match in map(CHUNKED.fullmatch, state) if match}
    first = sum(name.startswith("blocks.0.") for name in blocks.values())
    return len(blocks) // first if first else 0


def _prefixes(state: State) -> list[str]:
    return [name.removesuffix(end) for end in PATCH_EMBEDDINGS for name in state if name.endswith(end)]


def _choose(prefixes: list[str], branch: str | None, state: State) -> str:
    if not prefixes:
        raise InputError(
            f"no vision transformer that this tool knows among {len(state)} tensors ({listed(list(state))})"
        )
    if not branch and len(prefixes) == 1:
        return prefixes[0]
    wanted = branch or "teacher"
    chosen = [prefix for prefix in prefixes if wanted in prefix.split(".")]
    if len(chosen) != 1:
        raise InputError(
            f"{len(chosen)} backbones of the {wanted}; there are {listed([p or '-' for p in prefixes])}"
        )
    return chosen[0]


def _part(name: str) -> str:
    """The part of a training checkpoint that a tensor belongs to."""
    words = name.split(".")
    known = [i for i, word in enumerate(words) if PRETRAINING.fullmatch(f"{word}.x")]
    end = known[-1] + 1 if known else 1
    return ".".join(words[: end + 1] if words[end - 1] in ("student", "teacher") else words[:end])


def _layout(state: State) -> Layout:
    """By the names that only one layout has."""
    if any(name.startswith(("rope_embed.", "storage_tokens")) for name in state):
        raise InputError("a DINOv3 backbone: rotary instead of learned positions are not supported")
    if any(name.startswith("encoder.layer.") for name in state):
        modules = any(".attention.q_proj." in name for name in state)
        return HUGGING_FACE_MODULES if modules else HUGGING_FACE
    if any(name.endswith(".mlp.w1.weight") for name in state):
        return DINOV2_SPLIT
    dinov2 = "register_tokens" in state or any(name.endswith(".mlp.w12.weight") for name in state)
    if "reg_token" in state or ("mask_token" not in state and not dinov2):
        return TIMM
    return DINOV2
