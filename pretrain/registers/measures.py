"""How far a replacement is from what the model knows, and what it does to patches."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pretrain.registers.calibration import Calibration

FLOOR = 1e-6  # of the variance of a channel, relative to the mean one: constant channels are no evidence


def patch_cosines(full: Tensor, ablated: Tensor, places: Tensor, prefix: int) -> Tensor:
    """Cosines of patch tokens (B, N, D) that were not replaced themselves, (n,) fp32 on the CPU.

    Args:
        full: after the final norm.
        ablated: likewise.
        places: (B, S) positions that were replaced, among all tokens.
        prefix: tokens before the patches.
    """
    kept = untouched(places, prefix, full.shape[1])
    return cosine_similarity(full.float(), ablated.float(), dim=-1).cpu()[kept]


def untouched(places: Tensor, prefix: int, patches: int) -> Tensor:
    """Patches that were not replaced, (B, N) bool."""
    kept = torch.ones(len(places), prefix + patches, dtype=torch.bool)
    return kept.scatter(1, places, False)[:, prefix:]


def effective_rank(patches: Tensor) -> Tensor:
    """exp of the entropy of the eigenvalues of each image's patch Gram, (B, N, D) to (B,): 1 to min(N, D).

    Patches are made of unit length and not centred; eigenvalues are divided by their sum (Roy and Vetterli
    2007, of squared singular values).
    """
    squares = torch.linalg.svdvals(normalize(patches.float().cpu(), dim=-1)).square()
    return torch.special.entr(squares / squares.sum(-1, keepdim=True)).sum(-1).exp()


@dataclass
class Oddness:
    """Sums over all that was put in: how far it lies outside of what calibration images show."""

    calibration: Calibration
    number: dict[int, int] = field(default_factory=dict)  # replacements by block
    log_norm: dict[int, float] = field(default_factory=dict)
    distance: dict[int, float] = field(default_factory=dict)

    def add(self, block: int, places: Tensor, values: Tensor) -> None:
        """Take replacements (B, S, D) at positions (B, S) in.

        Norms are compared with the root of the calibration's mean squared norm. Distances are Mahalanobis's
        with a diagonal covariance, over root D: 1 is a token like those of the calibration, 0 their mean.
        """
        rows, known = values.detach().float().cpu(), self.calibration
        mean, var = known.mean[block, places], known.var[block, places]
        usual = (mean.square() + var).sum(-1).sqrt()
        floor = FLOOR * var.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
        spread = (rows - mean).square() / torch.maximum(var, floor)
        self._add(self.log_norm, block, (rows.norm(dim=-1) / usual).log())
        self._add(self.distance, block, spread.mean(-1).sqrt())
        self.number[block] = self.number.get(block, 0) + places.numel()

    @staticmethod
    def _add(sums: dict[int, float], block: int, values: Tensor) -> None:
        sums[block] = sums.get(block, 0.0) + float(values.double().sum())

    def means(self) -> dict[str, list[float]]:
        """Each figure by replaced block, mean over images and positions; the log norm of zeros is -inf."""
        return {
            name: [value / self.number[block] for block, value in sorted(getattr(self, name).items())]
            for name in ("log_norm", "distance")
        }
