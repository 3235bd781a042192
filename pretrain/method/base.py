"""The seam between the training loop and the mathematics of a method."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.method.outputs import BranchOutput, LossTerms, Targets


class Method(nn.Module, ABC):
    """Targets and losses of one step. What it keeps from step to step are buffers, equal on all ranks.

    In every method the teacher is the network that the targets are made with. What it is of the student is
    for section `teacher` to say: its running mean, or, with a momentum of 0, a copy.
    """

    @abstractmethod
    def targets(
        self, outputs: Iterable[BranchOutput], weights: Iterable[Tensor], temp: float, step: int
    ) -> list[Targets]:
        """Targets of every micro-batch of a step, over the whole global batch; collective.

        Args:
            outputs: the teacher's output per micro-batch.
            weights: mask weights (M,) per micro-batch; 0 marks padding.
            temp: teacher temperature.
            step: optimizer steps done; selects what changes in the course of a run.
        """

    @abstractmethod
    def losses(self, student: BranchOutput, targets: Targets, batch: Batch) -> LossTerms:
        """The loss of one micro-batch and its unweighted parts."""

    @abstractmethod
    def commit(self, good: Tensor) -> None:
        """End of a step: take in what it leaves for the next ones, unless it was bad (a bool scalar)."""
