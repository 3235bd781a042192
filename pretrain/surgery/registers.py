"""Backbones with more or fewer register tokens."""

from dataclasses import replace

import torch
from torch import Tensor

from pretrain.config.derived import vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.models.init import TOKENS_STD
from pretrain.seeding import torch_stream
from pretrain.surgery.layouts import State

MAX_REGISTERS = 1024  # beyond it a number is a slip
Result = tuple[dict[str, Tensor], ModelConfig]


def add_registers(state: State, model: ModelConfig, number: int, seed: int = 0) -> Result:
    """The backbone with `number` more registers, drawn as at the start of a training (std 1e-6).

    Existing registers stay first. Features change, because attention sees more tokens: train on.

    Raises:
        InputError: the number is not positive.
    """
    if not 1 <= number <= MAX_REGISTERS:
        raise InputError(f"add-registers: {number} must be from 1 to {MAX_REGISTERS}")
    dim, old = vit_shape(model).embed_dim, model.num_register_tokens
    drawn = torch.empty(1, number, dim)
    drawn.normal_(std=TOKENS_STD, generator=torch_stream(seed, "surgery", "register_tokens"))
    drawn = drawn.to(state["cls_token"].dtype)
    tokens = torch.cat([state["register_tokens"], drawn], dim=1) if old else drawn
    return {**state, "register_tokens": tokens}, replace(model, num_register_tokens=old + number)


def drop_registers(state: State, model: ModelConfig, keep: int = 0) -> Result:
    """The backbone with only the first `keep` registers. Features change: attention sees fewer tokens.

    Raises:
        InputError: there are no registers to drop.
    """
    number = model.num_register_tokens
    if not 0 <= keep < number:
        raise InputError(
            f"drop-registers: the model has {number} registers, --keep {keep} drops none of them"
        )
    rest = {name: tensor for name, tensor in state.items() if name != "register_tokens"}
    if keep:
        rest["register_tokens"] = state["register_tokens"][:, :keep].contiguous()
    return rest, replace(model, num_register_tokens=keep)
