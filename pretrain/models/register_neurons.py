"""Test-time registers (arXiv 2506.08010): one more token takes over what a few hidden units do to patches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.config.schema import ModelConfig
from pretrain.models.packing import Layout, unpack


def neurons_of(model: ModelConfig, block: int) -> tuple[int, ...]:
    """The register neurons of one block: hidden units of its feed-forward layer."""
    return tuple(unit for index, unit in model.register_neurons if index == block)


def move_to_register(hidden: Tensor, layout: Layout, prefix: int, neurons: Sequence[int]) -> Tensor:
    """Activations of a feed-forward layer, those of the register neurons moved to the test-time register.

    It gets the value of largest magnitude, with its sign, among all tokens of its sequence; patches get 0;
    the class token and trained registers keep theirs. (The released code takes the largest value instead, and
    gives trained registers 0.)

    Args:
        hidden: (T, M) of packed sequences.
        layout: of the sequences.
        prefix: tokens before the patches of each; the last of them is the test-time register.
        neurons: hidden units.

    Returns:
        (T, M); every other unit is as it was.
    """
    columns = torch.tensor(neurons, device=hidden.device)
    parts = []
    for part in unpack(hidden.index_select(1, columns), layout):  # (count, length, neurons)
        strongest = part.gather(1, part.abs().argmax(dim=1, keepdim=True))
        moved = [part[:, : prefix - 1], strongest, torch.zeros_like(part[:, prefix:])]
        parts.append(torch.cat(moved, dim=1).flatten(0, 1))
    return hidden.index_copy(1, columns, torch.cat(parts))
