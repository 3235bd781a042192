"""The class token's position in timm's models with registers: added to the token instead of stored apart."""

import torch
from torch import Tensor

from pretrain.surgery.layouts import State


def fold_class_position(state: State) -> dict[str, Tensor]:
    """cls_token + its position as cls_token, and the patches' positions alone: the sum that a forward makes.

    Args:
        state: pos_embed (1, 1 + N, D).
    """
    positions = state["pos_embed"]
    folded = {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return {**state, **folded}


def unfold_class_position(state: State) -> dict[str, Tensor]:
    """The same function in our form: the class token has the position 0.

    Args:
        state: pos_embed (1, N, D).
    """
    positions = state["pos_embed"]
    return {**state, "pos_embed": torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}
