"""Every block as a linear map of one token: what decides in which direction defective tokens grow.

The normalisation by a token's spread is dropped, LayerNorm's centring stays. The feed-forward layer becomes
its least-squares map for standard normal inputs, which Stein's lemma gives exactly: E[grad h].
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.special import ndtr

from pretrain.config.schema import ModelConfig
from pretrain.surgery.layouts import State

NODES = 64  # of the Gauss-Hermite quadrature; more change nothing at the precision of fp64
Hidden = tuple[Tensor, Tensor]  # slopes (M, D) and means (M,) of the hidden units


class BlockMaps(NamedTuple):
    """x to attention @ x, then mlp @ x, float64 (D, D); with biases as a last channel (D + 1, D + 1)."""

    attention: Tensor
    mlp: Tensor

    @property
    def block(self) -> Tensor:
        """The whole block."""
        return self.mlp @ self.attention


def block_maps(state: State, model: ModelConfig, index: int, biases: bool = False) -> BlockMaps:
    """The two linear maps of one block (paper, section 3.2), with the residual connection.

    Args:
        state: of the backbone.
        model: of the state.
        index: of the block.
        biases: the homogeneous variant, which the released code has but does not use: biases are a last
            column, and the token a vector with a last 1.
    """
    prefix = f"blocks.{index}."
    weights = {
        name.removeprefix(prefix): tensor.double()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    return BlockMaps(_attention(weights, biases), _mlp(weights, model, biases))


def _attention(weights: dict[str, Tensor], biases: bool) -> Tensor:
    """One token attends to itself alone: queries and keys play no part, and heads none either."""
    values, shift = weights["attn.qkv.weight"].chunk(3)[2], weights["attn.qkv.bias"].chunk(3)[2]
    linear = weights["attn.proj.weight"] @ values
    constant = (
        linear @ weights["norm1.bias"] + weights["attn.proj.weight"] @ shift + weights["attn.proj.bias"]
    )
    return _residual(linear, constant, weights, "1", biases)


def _mlp(weights: dict[str, Tensor], model: ModelConfig, biases: bool) -> Tensor:
    if model.ffn_layer == "swiglu":
        slopes, means = swiglu_fit(weights["mlp.w12.weight"], weights["mlp.w12.bias"])
        out = "mlp.w3"
    else:
        slopes, means = gelu_fit(weights["mlp.fc1.weight"], weights["mlp.fc1.bias"])
        out = "mlp.fc2"
    linear = weights[f"{out}.weight"] @ slopes
    constant = linear @ weights["norm2.bias"] + weights[f"{out}.weight"] @ means + weights[f"{out}.bias"]
    return _residual(linear, constant, weights, "2", biases)


def _residual(
    linear: Tensor, constant: Tensor, weights: dict[str, Tensor], branch: str, biases: bool
) -> Tensor:
    """I + diag(gamma) linear diag(norm) C, with C = I - 11^T / D; constants as a last column where asked."""
    scaled = linear * weights[f"norm{branch}.weight"]
    scaled = scaled - scaled.mean(dim=1, keepdim=True)
    gamma = weights.get(f"ls{branch}.gamma")
    if gamma is not None:
        scaled, constant = gamma[:, None] * scaled, gamma * constant
    dim = len(scaled)
    if not biases:
        return torch.eye(dim, dtype=scaled.dtype) + scaled
    whole = torch.eye(dim + 1, dtype=scaled.dtype)
    whole[:dim, :dim] += scaled
    whole[:dim, dim] = constant
    return whole


def gelu_fit(weight: Tensor, bias: Tensor) -> Hidden:
    """The best linear map of x to GELU(W x + b) for x ~ N(0, I), without sampling.

    With s = |w| and r = sqrt(1 + s^2): E[h'] = Phi(b/r) + b/r^3 phi(b/r), E[h] = b Phi(b/r) + s^2/r phi(b/r).

    Args:
        weight: (M, D) float64.
        bias: (M,).
    """
    square = weight.square().sum(dim=1)
    spread = (1 + square).sqrt()
    ratio = bias / spread
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    slope = ndtr(ratio) + bias / spread**3 * density
    return slope[:, None] * weight, bias * ndtr(ratio) + square / spread * density


def swiglu_fit(weight: Tensor, bias: Tensor) -> Hidden:
    """The same for silu(W1 x + b1) * (W2 x + b2), gate first, by Gauss-Hermite quadrature.

    With s = |w1|, rho = w1 . w2, a = b1 + s z, c = b2 + rho/s z: E[silu'(a) c] w1 + E[silu(a)] w2.

    Args:
        weight: (2M, D) float64.
        bias: (2M,).
    """
    (gate, value), (gate_bias, value_bias) = weight.chunk(2), bias.chunk(2)
    length = gate.square().sum(dim=1).sqrt().clamp(min=1e-30)
    common = (gate * value).sum(dim=1) / length
    nodes, shares = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(NODES))
    shares = shares / math.sqrt(2 * math.pi)
    a = gate_bias + nodes[:, None] * length  # (nodes, M)
    c = value_bias + nodes[:, None] * common
    sigmoid = torch.sigmoid(a)
    slope, silu = sigmoid * (1 + a * (1 - sigmoid)), a * sigmoid
    along_gate, along_value = shares @ (slope * c), shares @ silu
    return along_gate[:, None] * gate + along_value[:, None] * value, shares @ (silu * c)
