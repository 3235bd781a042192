"""DINOv2's objective: what the teacher's outputs become, and what the student pays for missing them.

Per global batch: DINO on class tokens, iBOT on masked patches, KoLeo on the class tokens of the global crops
(weights in section `loss`). Centring or Sinkhorn sees the whole global batch before the first student
forward.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.config.derived import ibot_head, sinkhorn_outputs
from pretrain.config.schema import Config, HeadConfig
from pretrain.losses.centering import SoftmaxCenter, Target
from pretrain.losses.cross_entropy import TargetRows, cross_entropy
from pretrain.losses.dino import dino_losses, dino_targets
from pretrain.losses.ibot import ibot_loss
from pretrain.losses.koleo import koleo_of_crops
from pretrain.losses.sinkhorn import sinkhorn_targets
from pretrain.method.base import Method
from pretrain.method.outputs import BranchOutput, LossTerms, Targets
from pretrain.projection import Projection


class DinoV2(Method):
    """Targets and losses of one step; its only state is the centres."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.rmlp_start = cfg.rmlp.start_step
        self.kinds = {"dino": cfg.dino_head.kind, "ibot": ibot_head(cfg).kind}
        self.centers = nn.ModuleDict()
        if cfg.loss.centering == "softmax":
            for loss, head in (("dino", cfg.dino_head), ("ibot", ibot_head(cfg))):
                self._add_centers(loss, head, cfg)

    def _add_centers(self, loss: str, head: HeadConfig, cfg: Config) -> None:
        """A centre per loss and head or mixture: that of a head that takes over in the run starts at 0."""
        momentum = cfg.loss.center_momentum
        if head.kind == "mlp" or cfg.rmlp.start_step > 0:
            self.centers[loss] = SoftmaxCenter(head.prototypes, momentum)
        if head.kind != "mlp":
            self.centers[f"{loss}_rmlp"] = SoftmaxCenter(cfg.rmlp.outputs, momentum)

    @torch.no_grad()
    def targets(
        self, outputs: Iterable[BranchOutput], weights: Iterable[Tensor], temp: float, step: int
    ) -> list[Targets]:
        """See `Method`; the step selects the centre of the head in use."""
        outputs = list(outputs)
        dino = [out.dino for out in outputs]
        ibot = [out.ibot for out in outputs]
        ones = [torch.ones(len(p.features), device=p.features.device) for p in dino]
        dino_targets = self._targets("dino", dino, ones, temp, step)
        ibot_targets = self._targets("ibot", ibot, list(weights), temp, step)
        return [Targets(d, i) for d, i in zip(dino_targets, ibot_targets, strict=True)]

    def _targets(
        self, loss: str, projections: list[Projection], weights: list[Tensor], temp: float, step: int
    ) -> list[Target]:
        if self.cfg.loss.centering == "sinkhorn":
            outputs = sinkhorn_outputs(self.cfg, self.kinds[loss], step)
            return sinkhorn_targets(projections, weights, temp, self.cfg.loss.sinkhorn_iterations, outputs)
        randomized = f"{loss}_rmlp"
        in_use = randomized if randomized in self.centers and step >= self.rmlp_start else loss
        offset = cast(SoftmaxCenter, self.centers[in_use]).offset(projections, weights, temp)
        return [Target(p, offset, temp) for p in projections]

    @torch.no_grad()
    def commit(self, good: Tensor) -> None:
        """See `Method`; the centres take in the step's logits."""
        for center in self.centers.values():
            cast(SoftmaxCenter, center).commit(good)

    def losses(self, student: BranchOutput, targets: Targets, batch: Batch) -> LossTerms:
        """See `Method`."""
        dino_terms, ibot_terms = self._cross_entropies(student, targets, batch)
        dino_global, dino_local = dino_losses(dino_terms, batch.num_images)
        ibot = ibot_loss(ibot_terms, batch.mask_weights, len(batch.masks))
        koleo = koleo_of_crops(student.cls, batch.group_size)

        weights = self.cfg.loss
        total = (
            weights.dino_weight * (dino_global + dino_local)
            + weights.ibot_weight * ibot
            + weights.koleo_weight * koleo
        )
        parts = {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot, "koleo": koleo}
        return LossTerms(total, {"total": total.detach(), **{k: v.detach() for k, v in parts.items()}})

    def _cross_entropies(self, student: BranchOutput, targets: Targets, batch: Batch) -> list[Tensor]:
        """The loss of each class token (2 B + L B,) and of each masked patch (M,)."""
        size, temp = batch.num_images, self.cfg.loss.student_temp
        assert targets.ibot is not None, "patches have a loss"
        teacher = targets.dino.probabilities().unflatten(0, (2, size))
        dino, ibot = dino_targets(teacher, len(batch.local_crops) // size), targets.ibot.rows()
        if student.dino.prototypes is not student.ibot.prototypes:
            pairs: list[tuple[Projection, TargetRows]] = [(student.dino, dino), (student.ibot, ibot)]
            return [cross_entropy(projection, [rows], temp) for projection, rows in pairs]
        both = Projection(torch.cat([student.dino.features, student.ibot.features]), student.dino.prototypes)
        return [*cross_entropy(both, [dino, ibot], temp).split([dino.number, ibot.number])]
