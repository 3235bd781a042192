"""What a branch returns and what a step reports."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pretrain.batch import Batch
from pretrain.losses.centering import JoinedTargets, Target
from pretrain.projection import Projection


class BranchOutput(NamedTuple):
    """Output of one branch for one micro-batch, made from the wrapped module's dict of tensors."""

    cls: Tensor  # (G*B, D) normed class tokens of the global crops, before the head
    dino: Projection  # student: (G*B + L*B) rows, global crops first; teacher: (G*B)
    ibot: Projection  # (M) rows, the masked patches


def share_prototypes(outputs: Iterable[BranchOutput]) -> list[BranchOutput]:
    """The outputs of a step's micro-batches with one copy of the prototypes, which are equal in all of them.

    A copy per micro-batch would be gigabytes at K = 131,072; the others are freed one by one.
    """
    shared: list[BranchOutput] = []
    for out in outputs:
        first = shared[0] if shared else out
        dino = Projection(out.dino.features, first.dino.prototypes)
        ibot = Projection(out.ibot.features, first.ibot.prototypes)
        shared.append(BranchOutput(out.cls, dino, ibot))
    return shared


@dataclass(frozen=True)
class LossTerms:
    """Scalars of one micro-batch: what is optimised, and its parts before weighting."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Targets:
    """Targets of one micro-batch."""

    dino: Target | JoinedTargets  # (G*B) rows
    ibot: Target | None = None  # (M) rows; None where patches have no loss

    def let_go(self) -> "Targets":
        """The same targets without rows of K values."""
        return Targets(self.dino.let_go(), self.ibot and self.ibot.let_go())


@dataclass(frozen=True)
class Observation:
    """What a step lets be looked at; the last micro-batch stands for the others."""

    losses: list[dict[str, Tensor]]  # the unweighted parts, per micro-batch
    layer_norms: dict[str, Tensor]  # when `log.norms_every` asks for them, else empty
    student: BranchOutput
    teacher: BranchOutput
    targets: Targets
    batch: Batch
