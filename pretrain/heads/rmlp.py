"""Randomized-MLP head (arXiv 2511.05509): no parameters; its weights are drawn anew, from a named stream.

    W_l = I + (a / m_l) G_l,  G_l ~ N(0, 1) of shape (n_l, m_l),  I with ones on the main diagonal
    RMLP(x) = gelu(gelu(gelu(x W_1) W_2) W_3) W_4        no bias, no normalisation

widths D, 4D, 4D, floor(2D/3), K. The draw depends on (seed, loss, branch, layer, draw number) alone, so that
every rank, every micro-batch of a step and every resumed run sees the same weights, and nothing is stored.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from pretrain.config.schema import RmlpConfig
from pretrain.errors import InputError
from pretrain.projection import Projection, compute_dtype
from pretrain.seeding import torch_stream

NUM_LAYERS = 4


def rmlp_widths(embed_dim: int, outputs: int) -> tuple[int, ...]:
    """Widths of the input and of the four layers."""
    return (embed_dim, 4 * embed_dim, 4 * embed_dim, 2 * embed_dim // 3, outputs)


def check_memory(embed_dim: int, outputs: int, rows: int, free: int) -> None:
    """Refuse a head whose draws and logits cannot fit.

    Args:
        embed_dim: D.
        outputs: K.
        rows: tokens that the student projects in one forward, at least.
        free: bytes.

    Raises:
        InputError: with both sizes and the way out.
    """
    widths = rmlp_widths(embed_dim, outputs)
    draws = 4 * 4 * sum(n * m for n, m in pairwise(widths))  # two losses, two branches, fp32
    logits = 4 * rows * outputs
    if draws + logits > free:
        raise InputError(
            f"rmlp.outputs={outputs:,}: the draws of a step take {draws / 2**30:.1f} GiB, one fp32 copy of "
            f"the logits {logits / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; about the first 2D//3 = "
            f"{widths[3]:,} outputs carry the signal, so rmlp.outputs=4096 loses little"
        )


def layer_weight(noise: Tensor, amplitude: float, identity: bool) -> Tensor:
    """W = I + (a / m) G from standard-normal noise G (n, m), in place: I is never a matrix of its own."""
    weight = noise.mul_(amplitude / noise.shape[1])
    if identity:
        weight.diagonal().add_(1.0)
    return weight


def rmlp_projection(x: Tensor, weights: Sequence[Tensor]) -> Projection:
    """The head for given layer weights (n_l, m_l): tokens (rows, D) to (rows, 2D//3) and (K, 2D//3)."""
    *hidden, last = weights
    for weight in hidden:
        x = gelu(x @ weight)
    dtype = compute_dtype(x)
    return Projection(x.to(dtype), last.t().to(dtype))


class RmlpHead(nn.Module):
    """Parameter-free head of one loss in one branch; `begin_step` draws its weights before the forward."""

    def __init__(self, embed_dim: int, cfg: RmlpConfig, seed: int, loss: str, branch: str) -> None:
        super().__init__()
        self.cfg = cfg
        self.widths = rmlp_widths(embed_dim, cfg.outputs)
        self.out_dim = cfg.outputs
        self.seed = seed
        self.stream = (
            "both" if cfg.share_dino_ibot else loss,
            "both" if cfg.share_student_teacher else branch,
        )
        self.weights: list[Tensor] = []
        self.draw: int | None = None
        self.place: Tensor
        self.register_buffer("place", torch.empty(0), persistent=False)  # follows the module to its device

    def begin_step(self, step: int) -> None:
        """Draw this step's weights, unless they are those of the step before."""
        draw = step // self.cfg.resample_every if self.cfg.resample_every else 0
        if draw == self.draw:
            return
        self.weights = [self._layer(index, draw) for index in range(NUM_LAYERS)]
        self.draw = draw

    def _layer(self, index: int, draw: int) -> Tensor:
        device = self.place.device
        generator = torch_stream(self.seed, "rmlp", *self.stream, index, draw, device=device)
        shape = self.widths[index], self.widths[index + 1]
        noise = torch.randn(shape, generator=generator, device=device)
        return layer_weight(noise, self.cfg.amplitude, self.cfg.identity)

    def forward(self, x: Tensor) -> Projection:
        """Normed tokens (rows, D) to features (rows, 2D//3) and prototypes (K, 2D//3)."""
        if not self.weights:
            raise RuntimeError("RmlpHead.begin_step(step) must run before the forward")
        return rmlp_projection(x, self.weights)
