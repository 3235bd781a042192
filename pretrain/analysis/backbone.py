"""Weights as a model that computes, and as a name for what was computed with them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain.config.derived import vit_shape
from pretrain.export.weights import Weights
from pretrain.models.vit import VisionTransformer


def build_backbone(weights: Weights, device: torch.device) -> VisionTransformer:
    """The model with the weights, in fp32 on a device."""
    with torch.device("meta"):
        backbone = VisionTransformer(weights.model, "sdpa")
    state = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in weights.state.items()}
    backbone.load_state_dict(state, assign=True)
    return backbone.requires_grad_(False).eval()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits that name weights: equal for equal names, types and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(weights: Weights) -> str:
    """64 hexadecimal digits that name what a model computes: `fingerprint`, and what tensors do not tell."""
    model = weights.model
    untold = [
        vit_shape(model).num_heads,
        model.register_neurons,
        model.pos_embed_offset,
        model.pos_embed_antialias,
        model.img_size,
        model.img_width,
    ]
    return hashlib.sha256(f"{fingerprint(weights.state)} {untold}".encode()).hexdigest()


def short_names(paths: Sequence[Path]) -> list[str]:
    """Different names of models for tables: without folder and suffix where that tells them apart."""
    stems, names = [path.stem for path in paths], list[str]()
    for place, path in enumerate(paths):
        again = paths[:place].count(path)
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        names.append(f"{name} ({again + 1})" if again else name)
    return names
