"""SwAV's objective (Caron et al. 2020, arXiv 2006.09882): each crop predicts the codes of the others.

The code of a global crop is its row of a Sinkhorn-Knopp assignment of class tokens to prototypes: one
assignment for the first and one for the second global crops, each over the whole global batch and, with
`method.queue`, the last images before it. The swapped prediction is the cross-entropy of a crop's softmax
with the code of each global crop other than itself: the pairs of crops, and their mean, are those of DINO.
The paper's epsilon is the teacher's temperature here, its tau the student's.

The student is its own target network: the codes come from its weights at the beginning of the step, in a
forward of the global crops without gradient and without drop path. `teacher.momentum` is 0, so what engine
and checkpoint call the teacher is a copy of the student, equal to the bit after every step.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config.derived import sinkhorn_outputs
from pretrain.config.schema import Config
from pretrain.losses.centering import JoinedTargets, Target
from pretrain.losses.cross_entropy import cross_entropy
from pretrain.losses.dino import dino_losses, dino_targets
from pretrain.losses.koleo import koleo_of_crops
from pretrain.losses.sinkhorn import sinkhorn_targets
from pretrain.method.base import Method
from pretrain.method.feature_queue import FeatureQueue
from pretrain.method.outputs import BranchOutput, LossTerms, Targets
from pretrain.projection import Projection


class Swav(Method):
    """Codes and losses of one step; its only state is the queue, where there is one."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        images, dim = cfg.method.queue, cfg.dino_head.bottleneck_dim
        self.queue = FeatureQueue(images, dim) if images else None

    @torch.no_grad()
    def targets(
        self, outputs: Iterable[BranchOutput], weights: Iterable[Tensor], temp: float, step: int
    ) -> list[Targets]:
        """See `Method`; patches have no loss, so their weights count for nothing."""
        crops = [_global_crops(out.dino) for out in outputs]
        first, second = (self._codes(crop, [pair[crop] for pair in crops], temp, step) for crop in range(2))
        if self.queue is not None:
            pairs = [torch.stack([one.features, two.features]) for one, two in crops]  # (2, B, b) each
            self.queue.push(torch.cat(pairs, dim=1))
        return [Targets(JoinedTargets(pair)) for pair in zip(first, second, strict=True)]

    def _codes(self, crop: int, projections: list[Projection], temp: float, step: int) -> list[Target]:
        """Codes of the first or the second global crops of every micro-batch."""
        features, prototypes = projections[0]
        rows, weights = projections, [features.new_ones(len(p.features)) for p in projections]
        if self.queue is not None and step >= self.cfg.method.queue_start_step:
            earlier, known = self.queue.share(features.dtype)
            rows, weights = [*rows, Projection(earlier[crop], prototypes)], [*weights, known]
        outputs = sinkhorn_outputs(self.cfg, self.cfg.dino_head.kind, step)
        codes = sinkhorn_targets(rows, weights, temp, self.cfg.loss.sinkhorn_iterations, outputs)
        return codes[: len(projections)]

    @torch.no_grad()
    def commit(self, good: Tensor) -> None:
        """See `Method`; the step's features enter the queue."""
        if self.queue is not None:
            self.queue.commit(good)

    def losses(self, student: BranchOutput, targets: Targets, batch: Batch) -> LossTerms:
        """See `Method`."""
        size, weights = batch.num_images, self.cfg.loss
        codes = targets.dino.probabilities().unflatten(0, (2, size))
        rows = dino_targets(codes, len(batch.local_crops) // size)
        terms = cross_entropy(student.dino, [rows], weights.student_temp)
        swav_global, swav_local = dino_losses(terms, size)
        koleo = koleo_of_crops(student.cls, batch.group_size)
        total = weights.dino_weight * (swav_global + swav_local) + weights.koleo_weight * koleo
        parts = {"total": total, "swav_global": swav_global, "swav_local": swav_local, "koleo": koleo}
        return LossTerms(total, {name: part.detach() for name, part in parts.items()})


def _global_crops(projection: Projection) -> tuple[Projection, Projection]:
    """The rows of the first and of the second global crops, (B, b) each."""
    first, second = projection.split([len(projection.features) // 2] * 2)
    return first, second
