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
from pretrain.config.derived import ibot_head, signal_outputs
from pretrain.config.schema import Config, HeadConfig
from pretrain.losses.centering import SoftmaxCenter, Target
from pretrain.losses.cross_entropy import TargetRows, cross_entropy
from pretrain.losses.dino import dino_losses, dino_targets
from pretrain.losses.ibot import ibot_loss
from pretrain.losses.koleo import koleo_loss
from pretrain.losses.sinkhorn import sinkhorn_targets
from pretrain.method.outputs import BranchOutput, LossTerms, Targets
from pretrain.projection import Projection


class DinoV2(nn.Module):
    """Targets and losses of one step; its only state is the centres."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg.loss
        self.rmlp_start = cfg.rmlp.start_step
        self.rmlp_outputs = signal_outputs(cfg)
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
        """Targets of every micro-batch of a step.

        Args:
            outputs: the teacher's output per micro-batch.
            weights: mask weights (M,) per micro-batch; 0 marks padding.
            temp: teacher temperature.
            step: selects the centre of the head in use.
        """
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
        if self.cfg.centering == "sinkhorn":
            # A randomized head's other outputs hold noise, which Sinkhorn would fill with most of the mass;
            # a mixture's hold the trainable head's logits.
            alone = self.kinds[loss] == "rmlp" and step >= self.rmlp_start
            outputs = self.rmlp_outputs if alone else None
            return sinkhorn_targets(projections, weights, temp, self.cfg.sinkhorn_iterations, outputs)
        randomized = f"{loss}_rmlp"
        in_use = randomized if randomized in self.centers and step >= self.rmlp_start else loss
        offset = cast(SoftmaxCenter, self.centers[in_use]).offset(projections, weights, temp)
        return [Target(p, offset, temp) for p in projections]

    @torch.no_grad()
    def commit(self, good: Tensor) -> None:
        """End of a step: the centres take in its logits, unless the step was bad."""
        for center in self.centers.values():
            cast(SoftmaxCenter, center).commit(good)

    def losses(self, student: BranchOutput, targets: Targets, batch: Batch) -> LossTerms:
        """The loss of one micro-batch and its unweighted parts."""
        size, groups = batch.num_images, batch.num_images // batch.group_size
        dino_terms, ibot_terms = self._cross_entropies(student, targets, batch)
        dino_global, dino_local = dino_losses(
            dino_terms[: 2 * size].unflatten(0, (2, size)), dino_terms[2 * size :].unflatten(0, (-1, size))
        )
        ibot = ibot_loss(ibot_terms, batch.mask_weights, len(batch.masks))
        koleo = (
            koleo_loss(student.cls.unflatten(0, (2, groups, batch.group_size))).mean(1).sum()
        )  # crops summed

        weights = self.cfg
        total = (
            weights.dino_weight * (dino_global + dino_local)
            + weights.ibot_weight * ibot
            + weights.koleo_weight * koleo
        )
        parts = {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot, "koleo": koleo}
        return LossTerms(total, {"total": total.detach(), **{k: v.detach() for k, v in parts.items()}})

    def _cross_entropies(self, student: BranchOutput, targets: Targets, batch: Batch) -> list[Tensor]:
        """The loss of each class token (2 B + L B,) and of each masked patch (M,)."""
        size, temp = batch.num_images, self.cfg.student_temp
        teacher = targets.dino.probabilities().unflatten(0, (2, size))
        dino, ibot = dino_targets(teacher, len(batch.local_crops) // size), targets.ibot.rows()
        if student.dino.prototypes is not student.ibot.prototypes:
            pairs: list[tuple[Projection, TargetRows]] = [(student.dino, dino), (student.ibot, ibot)]
            return [cross_entropy(projection, [rows], temp) for projection, rows in pairs]
        both = Projection(torch.cat([student.dino.features, student.ibot.features]), student.dino.prototypes)
        return [*cross_entropy(both, [dino, ibot], temp).split([dino.number, ibot.number])]
