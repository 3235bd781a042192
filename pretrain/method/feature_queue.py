"""Features of the last images, which take part in the codes of later batches (SwAV's queue)."""

import torch
from torch import Tensor, nn

from pretrain import distributed


class FeatureQueue(nn.Module):
    """Head features of the last Q images of the run, for each global crop; equal on all ranks.

    Every rank keeps the whole queue, so that a run may go on with another number of them, and brings its own
    share of the rows into the codes. Q is a multiple of the global batch: whole batches leave together.
    """

    features: Tensor  # (2, Q, b) float32, the newest first
    filled: Tensor  # () int64: rows that hold an image

    def __init__(self, images: int, dim: int) -> None:
        super().__init__()
        self.pending: Tensor | None = None  # what the features become at the end of a good step ...
        self.entering = 0  # ... and the images that come in
        self.register_buffer("features", torch.zeros(2, images, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def share(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """This rank's rows (2, q, b) in a dtype, and their weights (q,): 0 where there is no image yet."""
        rank, ranks = distributed.rank(), distributed.world_size()
        weights = (torch.arange(self.features.shape[1], device=self.filled.device) < self.filled).float()
        return self.features[:, rank::ranks].to(dtype), weights[rank::ranks]

    def push(self, features: Tensor) -> None:
        """Let this rank's images of the step, (2, n, b), enter at `commit`; collective."""
        everyone = distributed.all_gather(features.float().transpose(0, 1)).transpose(0, 1)
        kept = self.features.shape[1] - everyone.shape[1]
        self.pending = torch.cat([everyone, self.features[:, :kept]], dim=1)
        self.entering = everyone.shape[1]

    def commit(self, good: Tensor) -> None:
        """End of the step: the oldest images make room for its own, if it was good (a bool scalar)."""
        if self.pending is not None:
            self.features = torch.where(good, self.pending, self.features)
            self.filled = (self.filled + self.entering * good).clamp(max=self.features.shape[1])
        self.pending = None
