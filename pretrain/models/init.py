"""Initial weights: DINOv2's distributions, each parameter drawn from its own random stream.

A parameter's values depend on (seed, name) alone: not on the order of construction, the device or the
sharding.
"""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import init

from pretrain.models.block import LayerScale
from pretrain.seeding import torch_stream
from pretrain.sharded import assign

TOKENS_STD = 1e-6  # class token and registers start almost equal for all images


def init_weights(module: nn.Module, seed: int) -> None:
    """Fill every parameter of a branch (backbone and heads), wherever it lies; one whole one at a time."""
    for path, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            whole = torch.empty(parameter.shape)
            _init_parameter(owner, leaf, whole, torch_stream(seed, "init", f"{path}.{leaf}"))
            assign(parameter, whole)


def _init_parameter(owner: nn.Module, leaf: str, parameter: Tensor, generator: Generator) -> None:
    match owner:
        case nn.LayerNorm():
            init.constant_(parameter, 1.0 if leaf == "weight" else 0.0)
        case LayerScale():
            init.constant_(parameter, owner.initial)
        case nn.Conv2d():  # PyTorch's default: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weight and bias
            bound = 1 / math.sqrt(owner.in_channels * math.prod(owner.kernel_size))
            init.uniform_(parameter, -bound, bound, generator=generator)
        case nn.Linear():
            _ = (
                init.trunc_normal_(parameter, std=0.02, generator=generator)
                if leaf == "weight"
                else init.zeros_(parameter)
            )
        case _:
            _init_named(leaf, parameter, generator)


def _init_named(leaf: str, parameter: Tensor, generator: Generator) -> None:
    """Parameters that a module owns directly."""
    match leaf:
        case "pos_embed":
            init.trunc_normal_(parameter, std=0.02, generator=generator)
        case "cls_token" | "register_tokens":
            init.normal_(parameter, std=TOKENS_STD, generator=generator)
        case "mask_token":
            init.zeros_(parameter)
        case "weight_g":  # prototypes start with length 1 ...
            init.ones_(parameter)
        case "weight_v":  # ... in the directions of an nn.Linear's default
            bound = 1 / math.sqrt(parameter.shape[1])
            init.uniform_(parameter, -bound, bound, generator=generator)
        case _:
            raise ValueError(f"no initial distribution for a parameter named {leaf}")
