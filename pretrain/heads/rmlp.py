"""Randomized-MLP head (arXiv 2511.05509): no parameters; its weights are drawn anew, from a named stream.

    W_l = I + (a / m_l) G_l,  G_l of shape (n_l, m_l) and variance 1,  I with ones on the main diagonal
    RMLP(x) = gelu(gelu(gelu(x W_1) W_2) W_3) W_4        no bias, no normalisation

widths D, 4D, 4D, floor(2D/3), K. The paper's G is Gaussian; the other kinds of `rmlp.init` are ours. The draw
depends on (seed, loss, branch, layer, draw number) alone, so that every rank, every micro-batch of a step and
every resumed run sees the same weights, and nothing is stored.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from pretrain.config.derived import rmlp_widths
from pretrain.config.schema import RmlpConfig
from pretrain.errors import InputError
from pretrain.heads.draws import LayerWeights
from pretrain.projection import Projection, compute_dtype


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
        self.stream = (
            "both" if cfg.share_dino_ibot else loss,
            "both" if cfg.share_student_teacher else branch,
        )
        self.layers = LayerWeights(self.widths, cfg, seed, self.stream)
        self.place: Tensor
        self.register_buffer("place", torch.empty(0), persistent=False)  # follows the module to its device

    @property
    def weights(self) -> list[Tensor]:
        """The weights of the current draw, (n_l, m_l) fp32; none before the first."""
        return self.layers.weights

    def share_draws(self, other: "RmlpHead") -> None:
        """Use the weights of another head of the same stream: they are drawn and kept once."""
        if self.stream == other.stream:
            self.layers = other.layers

    def begin_step(self, step: int, amplitude: float | None = None) -> None:
        """Draw this step's weights, unless they are those of the step before.

        Args:
            step: optimizer steps done.
            amplitude: a of this step; default: `rmlp.amplitude`.
        """
        number = step // self.cfg.resample_every if self.cfg.resample_every else 0
        self.layers.draw(number, self.cfg.amplitude if amplitude is None else amplitude, self.place.device)

    def forward(self, x: Tensor) -> Projection:
        """Normed tokens (rows, D) to features (rows, 2D//3) and prototypes (K, 2D//3)."""
        if not self.weights:
            raise RuntimeError("RmlpHead.begin_step(step) must run before the forward")
        return rmlp_projection(x, self.layers.as_dtype(compute_dtype(x)))
