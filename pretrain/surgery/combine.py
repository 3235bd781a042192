"""Averages of several backbones, and other precisions of one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.errors import InputError
from pretrain.surgery.layouts import State
from pretrain.surgery.progress import Advance, ignore


def average(
    states: Sequence[State], weights: Sequence[float], advance: Advance = ignore
) -> dict[str, Tensor]:
    """sum_i w_i theta_i / sum_i w_i, in float64, one tensor at a time, in the first one's dtypes.

    Args:
        states: of one architecture.
        weights: one a state; 0 or more, not all 0.
        advance: told of bytes.

    Raises:
        InputError: not one such weight a state, or tensors that do not match.
    """
    if len(weights) != len(states):
        raise InputError(f"--weights: {len(weights)} weights for {len(states)} files; give one a file")
    largest = max(weights)
    if not (0 < largest < math.inf and all(weight >= 0 for weight in weights)):
        raise InputError("--weights: all must be 0 or more, and one above 0")
    shares = [weight / largest for weight in weights]
    first, total = states[0], sum(shares)
    result = {}
    for name, tensor in first.items():
        sums = torch.zeros(tensor.shape, dtype=torch.float64)
        for state, share in zip(states, shares, strict=True):
            sums.add_(_matching(state, name, tensor), alpha=share / total)
        result[name] = sums.to(tensor.dtype)
        advance(tensor.nbytes)
    return result


def ema_weights(number: int, momentum: float) -> list[float]:
    """Weights of an exponential moving average, the oldest state first: m^(n-1), (1-m) m^(n-2), ..., 1-m.

    Raises:
        InputError: the momentum is not between 0 and 1.
    """
    if not 0 < momentum < 1:
        raise InputError(f"--ema: {momentum} must be between 0 and 1")
    rest = [(1 - momentum) * momentum ** (number - 1 - i) for i in range(1, number)]
    return [momentum ** (number - 1), *rest]


def cast(state: State, dtype: torch.dtype, advance: Advance = ignore) -> dict[str, Tensor]:
    """All tensors in another floating-point type.

    Raises:
        InputError: a value is too large for it.
    """
    result = {}
    for name, tensor in state.items():
        result[name] = tensor.to(dtype)
        if not torch.isfinite(result[name]).all():
            largest = tensor.abs().max().item()
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"{name}: its largest value {largest:.3g} does not fit {kind}; use bfloat16")
        advance(tensor.nbytes)
    return result


def vanished(before: State, after: State) -> int:
    """Values that are not 0 before and 0 after: too small for the new type."""
    return sum(int(((after[name] == 0) & (tensor != 0)).sum()) for name, tensor in before.items())


def _matching(state: State, name: str, tensor: Tensor) -> Tensor:
    other = state.get(name)
    if other is None or other.shape != tensor.shape:
        shape = "missing" if other is None else f"{tuple(other.shape)}"
        raise InputError(f"{name} is {tuple(tensor.shape)} in the first file and {shape} in another")
    return other.double()
