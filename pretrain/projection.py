"""What a head returns: bottleneck features and the prototypes they are compared with.

Logits are their product, and linear in both. Keeping the two factors instead of the logits lets targets be
computed over a whole global batch, whatever its number of micro-batches, without storing rows of K values.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class Projection(NamedTuple):
    """Factors of a head's logits."""

    features: Tensor  # (rows, b)
    prototypes: Tensor  # (K, b)

    def logits(self) -> Tensor:
        """(rows, K) float32."""
        return linear(self.features, self.prototypes).float()

    def weighted_sum(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of the logits over the rows (K,), and the sum of the weights; forms no logits."""
        total = (weights.unsqueeze(1) * self.features.float()).sum(0)
        return linear(total, self.prototypes.float()), weights.sum()

    def first(self, outputs: int) -> "Projection":
        """The same rows with the first prototypes only."""
        return Projection(self.features, self.prototypes[:outputs])

    def split(self, sizes: list[int]) -> list["Projection"]:
        """The same prototypes with consecutive rows."""
        return [Projection(rows, self.prototypes) for rows in self.features.split(sizes)]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products run in: autocast's if it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
