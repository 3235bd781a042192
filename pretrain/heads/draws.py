"""Weights W = I + (a / m) G of randomized layers, drawn from a named stream into buffers that are kept.

The entries of G (n, m) have mean 0 and variance 1, for `orthogonal` on average over the matrix. Then for each
kind E[<x W, y W>] = <x I, y I> + (a^2 / m) <x, y>: a layer keeps inner products up to a known factor.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.schema import RmlpConfig, RmlpInit
from pretrain.seeding import torch_stream


def fill_noise(out: Tensor, init: RmlpInit, generator: torch.Generator) -> Tensor:
    """Fill `out` (n, m) with G, in place.

    Args:
        out: fp32, on the generator's device.
        init: the distribution of G; `sparse` is Achlioptas's (2003), a third of it not 0.
        generator: all randomness comes from here.
    """
    match init:
        case "gaussian":
            return out.normal_(generator=generator)
        case "rademacher":
            return _fill_signs(out, generator)
        case "sparse":  # sqrt(3) times: -1 for a die's 0, 1 for its 5, 0 for the four numbers between
            return out.random_(0, 6, generator=generator).sub_(2.5).div_(2.5).trunc_().mul_(3**0.5)
        case "orthogonal":
            return _fill_orthogonal(out, generator)


def _fill_signs(out: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1, eight of them from each random byte: on a CPU the generator's numbers are most of the cost."""
    size = -(-out.numel() // 8)
    octets = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator, device=out.device)
    places = torch.arange(8, dtype=torch.uint8, device=out.device).unsqueeze(1)
    bits = octets.bitwise_right_shift(places).bitwise_and_(1)  # (8, size)
    return out.copy_(bits.flatten()[: out.numel()].view_as(out)).mul_(2).sub_(1)


def _fill_orthogonal(out: Tensor, generator: torch.Generator) -> Tensor:
    """Rows or columns, whichever are fewer, orthogonal, uniformly distributed (signs: Mezzadri 2007)."""
    normal = out.normal_(generator=generator)
    wide = out.shape[0] < out.shape[1]
    q, r = torch.linalg.qr(normal.t() if wide else normal)
    q.mul_(r.diagonal().sign())
    return out.copy_(q.t() if wide else q).mul_(max(out.shape) ** 0.5)


def layer_weight(noise: Tensor, amplitude: float, identity: bool) -> Tensor:
    """W = I + (a / m) G from noise G (n, m), in place: I is never a matrix of its own."""
    weight = noise.mul_(amplitude / noise.shape[1])
    if identity:
        weight.diagonal().add_(1.0)
    return weight


class Drawn(NamedTuple):
    """What the weights in the buffers are a function of, besides the name of the stream."""

    number: int
    amplitude: float
    device: torch.device


class LayerWeights:
    """The weights of all layers for one draw; every draw fills the same memory."""

    def __init__(self, widths: Sequence[int], cfg: RmlpConfig, seed: int, stream: tuple[str, str]) -> None:
        self.shapes = list(pairwise(widths))
        self.cfg, self.seed, self.stream = cfg, seed, stream
        self.drawn: Drawn | None = None
        self.weights: list[Tensor] = []  # (n_l, m_l) fp32
        self.lowered: list[Tensor] = []  # the same in the dtype of the matrix products
        self.lowered_from: Drawn | None = None

    @torch.no_grad()
    def draw(self, number: int, amplitude: float, device: torch.device) -> None:
        """Fill the buffers with the draw of that number, unless they hold it."""
        wanted = Drawn(number, amplitude, device)
        if wanted == self.drawn:
            return
        if self.drawn is None or self.drawn.device != device:
            self.weights = [torch.empty(shape, device=device) for shape in self.shapes]
        for index, weight in enumerate(self.weights):
            generator = torch_stream(self.seed, "rmlp", *self.stream, index, number, device=device)
            layer_weight(fill_noise(weight, self.cfg.init, generator), amplitude, self.cfg.identity)
        self.drawn = wanted

    @torch.no_grad()
    def as_dtype(self, dtype: torch.dtype) -> list[Tensor]:
        """The weights in a dtype; rounded once a draw, not once a forward."""
        if dtype == torch.float32:
            return self.weights
        if not self.lowered or (self.lowered[0].dtype, self.lowered[0].device) != (
            dtype,
            self.weights[0].device,
        ):
            self.lowered, self.lowered_from = [torch.empty_like(w, dtype=dtype) for w in self.weights], None
        if self.lowered_from != self.drawn:
            for low, weight in zip(self.lowered, self.weights, strict=True):
                low.copy_(weight)
            self.lowered_from = self.drawn
        return self.lowered
