"""`SSLBranch`: backbone and heads as one module with one forward, which every engine can wrap."""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from pretrain.batch import Batch, normalize_pixels
from pretrain.config.derived import ibot_head, rmlp_strength
from pretrain.config.schema import Config, HeadConfig
from pretrain.heads import MlpHead, RmlpHead, mix
from pretrain.method.outputs import BranchOutput
from pretrain.models.attention import Backend
from pretrain.models.vit import Features, VisionTransformer
from pretrain.projection import Projection

Role = Literal["student", "teacher"]
Loss = Literal["dino", "ibot"]
LOSSES: tuple[Loss, Loss] = ("dino", "ibot")


class Heads(NamedTuple):
    """What projects for one loss."""

    trainable: MlpHead | None
    randomized: RmlpHead | None


class SSLBranch(nn.Module):
    """One branch of the student/teacher pair.

    The student sees all crops, the global ones masked; the teacher sees the global crops unmasked and
    projects the patches that are hidden from the student. Children are named as in released training
    checkpoints: backbone, dino_head and, unless it is shared, ibot_head. Randomized heads have no parameters
    and take the place of those from `rmlp.start_step` on, or are mixed with them. Crops arrive as uint8 and
    are normalised here: the micro-batches of a step wait in a quarter of the memory.
    """

    mean: Tensor  # (C,)
    std: Tensor  # (C,)

    def __init__(self, cfg: Config, role: Role, backend: Backend = "sdpa") -> None:
        super().__init__()
        self.role = role
        for name, values in (("mean", cfg.data.mean), ("std", cfg.data.std)):  # never on the meta device
            self.register_buffer(name, torch.tensor(values, device="cpu"), persistent=False)
        self.backbone = VisionTransformer(cfg.model, backend)
        self.dino_head = self._trainable_head(cfg, cfg.dino_head)
        self.ibot_head = None if cfg.ibot_head.shared else self._trainable_head(cfg, cfg.ibot_head)
        self.kinds = {"dino": cfg.dino_head.kind, "ibot": ibot_head(cfg).kind}
        self.rmlp = nn.ModuleDict()
        for loss, kind in self.kinds.items():
            if kind != "mlp":
                self.rmlp[loss] = RmlpHead(self.backbone.embed_dim, cfg.rmlp, cfg.run.seed, loss, role)
        if cfg.rmlp.share_dino_ibot and len(self.rmlp) == 2:
            self.rmlp["ibot"] = self.rmlp["dino"]
        self.rmlp_start = cfg.rmlp.start_step
        self.cfg = cfg
        self.step, self.share = 0, 0.0

    def _trainable_head(self, cfg: Config, head: HeadConfig) -> MlpHead | None:
        """The MLP head, unless RMLP alone takes its place from the first step on."""
        if head.kind == "rmlp" and cfg.rmlp.start_step == 0:
            return None
        return MlpHead(self.backbone.embed_dim, head)

    @property
    def changes_heads(self) -> bool:
        """Whether randomized heads take the place of trainable ones in the course of the run."""
        return "rmlp" in self.kinds.values() and self.rmlp_start > 0

    def fsdp_units(self) -> list[nn.Module]:
        """What a sharding engine gathers one after another."""
        return list(self.backbone.blocks)

    def begin_step(self, step: int) -> None:
        """Choose the heads of this step and draw their weights, before any forward."""
        strength = rmlp_strength(self.cfg, step)
        self.step, self.share = step, strength.mix
        for loss in LOSSES:
            randomized = self.heads(loss).randomized
            if randomized is not None:
                randomized.begin_step(step, strength.amplitude)

    def share_draws(self, other: "SSLBranch") -> None:
        """Draw and keep once what both branches draw alike, with `rmlp.share_student_teacher`."""
        for loss, head in self.rmlp.items():
            cast(RmlpHead, head).share_draws(cast(RmlpHead, other.rmlp[loss]))

    def heads(self, loss: Loss) -> Heads:
        """The heads that project for this loss at the current step: one, or both where they are mixed."""
        trainable = self.ibot_head if loss == "ibot" and self.ibot_head is not None else self.dino_head
        if loss not in self.rmlp or self.step < self.rmlp_start:
            return Heads(trainable, None)
        randomized = cast(RmlpHead, self.rmlp[loss])
        if self.kinds[loss] == "rmlp":
            return Heads(None, randomized)
        return Heads(trainable, randomized if self.share > 0 else None)

    def forward(self, batch: Batch | Tensor) -> dict[str, Tensor]:
        """A `BranchOutput` as a flat dict of tensors, which every engine's hooks can walk.

        Images (B, C, S, S) in place of a batch: the backbone's `Features`, by name.
        """
        if isinstance(batch, Tensor):
            features: Features = self.backbone([batch])[0]
            return features._asdict()
        if self.role == "student":
            groups = self._student_features(batch)
        else:
            groups = self.backbone([self._pixels(batch.global_crops)], patches=[batch.mask_indices])
        cls_global = groups[0].cls
        dino, ibot = self._project(torch.cat([group.cls for group in groups]), groups[0].patches)
        output = {
            "cls": cls_global,
            "dino_features": dino.features,
            "dino_prototypes": dino.prototypes,
            "ibot_features": ibot.features,
        }
        if ibot.prototypes is not dino.prototypes:
            output["ibot_prototypes"] = ibot.prototypes
        return output

    def _pixels(self, crops: Tensor) -> Tensor:
        """Crops as the backbone takes them; float ones are normalised already."""
        return normalize_pixels(crops, self.mean, self.std) if crops.dtype == torch.uint8 else crops

    def _student_features(self, batch: Batch) -> list[Features]:
        drop_rows = None
        if batch.drop_global is not None and batch.drop_local is not None:
            drop_rows = [batch.drop_global, batch.drop_local]
        features: list[Features] = self.backbone(
            [self._pixels(batch.global_crops), self._pixels(batch.local_crops)],
            [batch.masks, None],
            drop_rows,
            batch.num_images // batch.group_size,
            [batch.mask_indices, batch.mask_indices[:0]],
        )
        return features

    def _project(self, cls: Tensor, patches: Tensor) -> tuple[Projection, Projection]:
        """Both projections, each of a trainable head, a randomized one or the mixture of both."""
        dino, ibot = self.heads("dino"), self.heads("ibot")
        trainable = _both(dino.trainable, ibot.trainable, cls, patches)
        randomized = _both(dino.randomized, ibot.randomized, cls, patches)
        return _joined(trainable[0], randomized[0], self.share), _joined(
            trainable[1], randomized[1], self.share
        )


def _both(
    dino: nn.Module | None, ibot: nn.Module | None, cls: Tensor, patches: Tensor
) -> list[Projection | None]:
    """What two heads make of their rows; a shared head runs once, on all rows."""
    if dino is None or dino is not ibot:
        return [None if head is None else head(x) for head, x in ((dino, cls), (ibot, patches))]
    return [*dino(torch.cat([cls, patches])).split([len(cls), len(patches)])]


def _joined(trainable: Projection | None, randomized: Projection | None, share: float) -> Projection:
    if trainable is not None and randomized is not None:
        return mix(trainable, randomized, share)
    one = trainable if randomized is None else randomized
    assert one is not None, "every loss has a head"
    return one


def branch_output(tensors: dict[str, Tensor]) -> BranchOutput:
    """The typed view of what `SSLBranch.forward` returns; a shared head's prototypes are one tensor in it."""
    prototypes = tensors["dino_prototypes"]
    return BranchOutput(
        tensors["cls"],
        Projection(tensors["dino_features"], prototypes),
        Projection(tensors["ibot_features"], tensors.get("ibot_prototypes", prototypes)),
    )
