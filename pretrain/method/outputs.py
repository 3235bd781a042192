"""What a branch returns and what a step reports."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pretrain.projection import Projection


class BranchOutput(NamedTuple):
    """Output of one branch for one micro-batch, made from the wrapped module's dict of tensors."""

    cls: Tensor  # (G*B, D) normed class tokens of the global crops, before the head
    dino: Projection  # student: (G*B + L*B) rows, global crops first; teacher: (G*B)
    ibot: Projection  # (M) rows, the masked patches


@dataclass(frozen=True)
class LossTerms:
    """Scalars of one micro-batch: what is optimised, and its parts before weighting."""

    total: Tensor
    parts: dict[str, Tensor]
