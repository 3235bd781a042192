"""How far apart two backbones are: tensor by tensor, and in what they compute."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import permutations

import torch
from torch import Tensor

from pretrain.config.derived import ffn_hidden_dim, position_grid, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.models.vit import VisionTransformer
from pretrain.seeding import torch_stream
from pretrain.surgery.layouts import State
from pretrain.surgery.progress import Advance, ignore

RUN_ONLY = (
    "init_from",
    "attention",
    "drop_path_rate",
    "drop_path_uniform",
)  # of a run, not of weights
IMAGES = 2


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of both backbones."""

    name: str
    relative: float  # ||a - b|| / ||a||
    cosine: float  # of the flattened tensors
    largest: float  # of |a - b|


def model_differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """What the two model sections say differently about the weights, as lines.

    Sizes count, not the settings that they follow from: several ratios give one width of the feed-forward
    layer, and weights alone tell the width.
    """

    def facts(model: ModelConfig) -> dict[str, object]:
        named = {key: value for key, value in asdict(model).items() if key not in RUN_ONLY}
        grid = position_grid(model)
        named |= vit_shape(model)._asdict() | {"arch": "", "img_size": 0, "img_width": 0, "positions": grid}
        named |= {"ffn_ratio": 0, "ffn_hidden_dim": ffn_hidden_dim(model)}
        return named | {"layer_scale": model.layer_scale is not None}

    mine, theirs = facts(a), facts(b)
    return [f"{key}: {mine[key]} and {theirs[key]}" for key in mine if mine[key] != theirs[key]]


def tensor_differences(a: State, b: State, advance: Advance = ignore) -> list[TensorDifference]:
    """Every tensor of two backbones with the same names and shapes."""
    rows = []
    for name, left in a.items():
        rows.append(_difference(name, left, b[name]))
        advance(left.nbytes)
    return rows


def _difference(name: str, left: Tensor, right: Tensor) -> TensorDifference:
    if left.dtype == right.dtype and torch.equal(left, right):
        return TensorDifference(name, 0.0, 1.0, 0.0)
    x, y = left.double().flatten(), right.double().flatten()
    delta, norms = x - y, (x.norm(), y.norm())
    relative = delta.norm() / norms[0] if norms[0] else delta.norm()
    cosine = x @ y / (norms[0] * norms[1]) if norms[0] * norms[1] else torch.tensor(float(not delta.any()))
    return TensorDifference(name, relative.item(), cosine.item(), delta.abs().max().item())


def swapped_thirds(a: State, b: State) -> dict[str, str]:
    """qkv tensors of b whose thirds are those of a in another order: name to that order."""
    found = {}
    for name, left in a.items():
        if ".attn.qkv." not in name or torch.equal(left, b[name]):
            continue
        mine, theirs = left.chunk(3), b[name].chunk(3)
        for order in permutations(range(3)):
            if all(torch.equal(mine[i], part) for i, part in zip(order, theirs, strict=True)):
                found[name] = "".join("qkv"[i] for i in order)
    return found


def noise_images(model: ModelConfig, seed: int = 0) -> Tensor:
    """(2, C, S, S') images of standard normal noise, S and S' those of the position grid; always the same."""
    rows, columns = position_grid(model)
    size = (IMAGES, model.in_channels, rows * model.patch_size, columns * model.patch_size)
    return torch.empty(size).normal_(generator=torch_stream(seed, "surgery", "images"))


def backbone_features(state: State, model: ModelConfig) -> Callable[[Tensor], Tensor]:
    """What a backbone of ours computes, in fp32: images (B, C, S, S') to normed tokens (B, 1 + R + N, D).

    A test-time register is left out: what two such functions give can be compared token by token.
    """
    with torch.device("meta"):
        backbone = VisionTransformer(model)
    backbone.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        cls, registers, patches = backbone.eval()([images])[0]
        return torch.cat([cls.unsqueeze(1), registers[:, : model.num_register_tokens], patches], dim=1)

    return features


def feature_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the largest value of a; not finite when a value is not."""
    difference: float = ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item()
    return difference
