"""Every place inside a block where features can be read: what the probes of arXiv 2603.05280 look at.

The forward is that of the model, untouched; forward hooks look at it and keep pooled features alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pretrain.config.derived import ffn_hidden_dim, prefix_tokens, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.models.block import Block
from pretrain.models.vit import VisionTransformer

Point = Literal["LN1", "MHA", "MHA_LS", "RC1", "LN2", "FC1", "Act", "FC2", "FC2_LS", "RC2"]
POINTS: tuple[Point, ...] = get_args(Point)  # in the order of the computation
SCALED: tuple[Point, ...] = ("MHA_LS", "FC2_LS")  # only of models with LayerScale: MHA and FC2 times gamma
Look = Callable[[Tensor], None]  # told of tokens (B, T, D')


class Place(NamedTuple):
    """A point of a block; its name in files and tables is `block03_Act`."""

    block: int
    point: Point

    def __str__(self) -> str:
        """For files and tables."""
        return f"block{self.block:02d}_{self.point}"


class Pooled(NamedTuple):
    """What is kept of the tokens of B images; fp32."""

    cls: Tensor  # (B, D') class token
    patch_mean: Tensor  # (B, D') mean of the patches; registers belong to neither


def places(model: ModelConfig) -> list[Place]:
    """All of a model, in the order of the computation."""
    points = [point for point in POINTS if model.layer_scale is not None or point not in SCALED]
    return [Place(block, point) for block in range(vit_shape(model).depth) for point in points]


def width(model: ModelConfig, point: Point) -> int:
    """Channels of the features at a point; FC1 of SwiGLU holds gate and value."""
    match point:
        case "FC1":
            return ffn_hidden_dim(model) * (2 if model.ffn_layer == "swiglu" else 1)
        case "Act":
            return ffn_hidden_dim(model)
        case _:
            return vit_shape(model).embed_dim


@torch.no_grad()
def pooled_features(
    backbone: VisionTransformer, images: Tensor, wanted: Sequence[Place]
) -> dict[Place, Pooled]:
    """Pooled features of one batch at some places; no tokens outlive their hook.

    Args:
        backbone: on the device of the images.
        images: (B, C, S, S').
        wanted: places of the model.
    """
    found: dict[Place, Pooled] = {}

    def keep(place: Place) -> Look:
        def look(tokens: Tensor) -> None:
            found[place] = pool(tokens, prefix_tokens(backbone.cfg))

        return look

    with tapped(backbone, len(images), {place: keep(place) for place in wanted}):
        backbone([images])
    return {place: found[place] for place in wanted}


def pool(tokens: Tensor, prefix: int) -> Pooled:
    """Class token and mean patch of (B, T, D'), of which the first `prefix` tokens are no patches.

    Copies: a view of the class token would keep all tokens in memory.
    """
    return Pooled(tokens[:, 0].to(torch.float32, copy=True), tokens[:, prefix:].float().mean(dim=1))


@contextmanager
def tapped(backbone: VisionTransformer, number: int, looks: dict[Place, Look]) -> Iterator[None]:
    """While it lasts, every forward of `number` images of one size shows each place to its look.

    Args:
        backbone: its blocks get hooks.
        number: B, images of a forward.
        looks: by place; told of tokens (B, T, D') that they must not change.
    """
    with ExitStack() as hooks:
        for place, look in looks.items():
            hooks.callback(_hook(backbone, place, _unpacked(look, number)).remove)
        yield


def _unpacked(look: Look, number: int) -> Look:
    return lambda tokens: look(tokens.detach().unflatten(0, (number, -1)))


def _hook(backbone: VisionTransformer, place: Place, look: Look) -> RemovableHandle:
    block = cast(Block, backbone.blocks[place.block])
    first, last = ("fc1", "fc2") if backbone.cfg.ffn_layer == "mlp" else ("w12", "w3")
    match place.point:
        case "LN1":
            return _after(block.norm1, look)
        case "MHA":
            return _after(block.attn, look)
        case "MHA_LS":
            return _after(block.ls1, look)
        case "RC1":
            return _before(block.norm2, look)
        case "LN2":
            return _after(block.norm2, look)
        case "FC1":
            return _after(block.mlp.get_submodule(first), look)
        case "Act":
            return _before(block.mlp.get_submodule(last), look)
        case "FC2":
            return _after(block.mlp.get_submodule(last), look)
        case "FC2_LS":
            return _after(block.ls2, look)
        case "RC2":
            return _after(block, look)


def _after(module: nn.Module, look: Look) -> RemovableHandle:
    return module.register_forward_hook(lambda _module, _inputs, output: look(output))


def _before(module: nn.Module, look: Look) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda _module, inputs: look(inputs[0]))
