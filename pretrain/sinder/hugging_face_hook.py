"""A test-time register (arXiv 2506.08010) for the DINOv2 models of Hugging Face's transformers.

    model = transformers.AutoModel.from_pretrained("facebook/dinov2-large")
    attach(model)

One more token, zero at first, goes through all blocks at the end of the sequence. In the feed-forward layers
the neurons below give it their strongest activation, and patches none. No weight changes.

Outputs have their usual shapes: the token is cut off last_hidden_state, hidden_states and attentions. What
other tokens pay it in attention is cut off with it, so those rows sum to less than 1. `attention_mask` is not
supported. For Dinov2Model, Dinov2WithRegistersModel and their Backbone classes; of a model with a head, its
part `dinov2` or `dinov2_with_registers`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Hidden units by block. They belong to the weights that they were found in.
NEURONS: dict[int, list[int]] = {}

LAST_LINEAR = ("fc2", "down_proj", "weights_out")  # of MLP; of SwiGLU from transformers 5 on, and before
HANDLES = "test_time_register_handles"


def attach(model: Any) -> None:
    """Add the token to all forwards of a model.

    Raises:
        ValueError: the model is of another kind, lacks one of the neurons, or has the token already.
    """
    if hasattr(model, HANDLES):
        raise ValueError("the model has a test-time register already")
    if not (hasattr(model, "embeddings") and hasattr(getattr(model, "encoder", None), "layer")):
        raise ValueError(f"a {type(model).__name__} is no DINOv2 model without a head, as model.dinov2 is")
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    moves = [(_last_linear(model, block, units), units) for block, units in NEURONS.items()]
    handles = [model.embeddings.register_forward_hook(_append), model.encoder.register_forward_hook(_cut)]
    handles += [linear.register_forward_pre_hook(partial(_move, prefix, units)) for linear, units in moves]
    setattr(model, HANDLES, handles)


def detach(model: Any) -> None:
    """Undo `attach`."""
    for handle in getattr(model, HANDLES):
        handle.remove()
    delattr(model, HANDLES)


def _last_linear(model: Any, block: int, units: Sequence[int]) -> nn.Linear:
    """The layer whose input are the activations of a block's hidden units."""
    layers = model.encoder.layer
    if block >= len(layers):
        raise ValueError(f"the neurons are of another model: this one has no block {block}")
    mlp = layers[block].mlp
    linear: nn.Linear = next(getattr(mlp, name) for name in LAST_LINEAR if hasattr(mlp, name))
    if max(units) >= linear.in_features:
        raise ValueError(f"the neurons are of another model: block {block} here has no unit {max(units)}")
    return linear


def _append(_module: nn.Module, _inputs: Any, tokens: Tensor) -> Tensor:
    """(B, T, D) to (B, T + 1, D)."""
    return torch.cat([tokens, tokens.new_zeros(len(tokens), 1, tokens.shape[-1])], dim=1)


def _move(prefix: int, units: Sequence[int], _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Activations (B, T + 1, M), those of the units moved from the patches to the last token."""
    hidden = inputs[0].clone()
    chosen = hidden[..., units]
    hidden[:, -1, units] = chosen.gather(1, chosen.abs().argmax(dim=1, keepdim=True))[:, 0]
    hidden[:, prefix:-1, units] = 0
    return (hidden,)


def _cut(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """The outputs of the encoder without the last token; a tuple in some versions, else with names."""
    if isinstance(output, tuple):
        return _shortened(output)
    for name, value in list(output.items()):
        output[name] = _shortened(value)
    return output


def _shortened(value: Any) -> Any:
    """Hidden states (B, T + 1, D), attentions (B, H, T + 1, T + 1), tuples of them, None."""
    if isinstance(value, tuple):
        return tuple(map(_shortened, value))
    if value is None:
        return None
    return value[..., :-1, :-1] if value.ndim == 4 else value[:, :-1]
