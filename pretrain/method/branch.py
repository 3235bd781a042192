"""`SSLBranch`: backbone and heads as one module with one forward, which every engine can wrap."""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from pretrain.batch import Batch, normalize_pixels
from pretrain.config.derived import ibot_head
from pretrain.config.schema import Config, HeadConfig
from pretrain.heads import MlpHead, RmlpHead
from pretrain.method.outputs import BranchOutput
from pretrain.models.attention import Backend
from pretrain.models.vit import Features, VisionTransformer
from pretrain.projection import Projection

Role = Literal["student", "teacher"]
Loss = Literal["dino", "ibot"]


class SSLBranch(nn.Module):
    """One branch of the student/teacher pair.

    The student sees all crops, the global ones masked; the teacher sees the global crops unmasked and
    projects the patches that are hidden from the student. Children are named as in released training
    checkpoints: backbone, dino_head and, unless it is shared, ibot_head. Randomized heads have no parameters
    and take the place of those from `rmlp.start_step` on. Crops arrive as uint8 and are normalised here: the
    micro-batches of a step wait in a quarter of the memory.
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
        self.rmlp = nn.ModuleDict()
        for loss, head in (("dino", cfg.dino_head), ("ibot", ibot_head(cfg))):
            if head.kind == "rmlp":
                self.rmlp[loss] = RmlpHead(self.backbone.embed_dim, cfg.rmlp, cfg.run.seed, loss, role)
        self.rmlp_start = cfg.rmlp.start_step
        self.step = 0

    def _trainable_head(self, cfg: Config, head: HeadConfig) -> MlpHead | None:
        """The MLP head, unless RMLP takes its place from the first step on."""
        if head.kind == "rmlp" and cfg.rmlp.start_step == 0:
            return None
        return MlpHead(self.backbone.embed_dim, head)

    @property
    def changes_heads(self) -> bool:
        """Whether randomized heads take the place of trainable ones in the course of the run."""
        return len(self.rmlp) > 0 and self.rmlp_start > 0

    def fsdp_units(self) -> list[nn.Module]:
        """What a sharding engine gathers one after another."""
        return list(self.backbone.blocks)

    def begin_step(self, step: int) -> None:
        """Choose the heads of this step and draw their weights, before any forward."""
        self.step = step
        for loss in ("dino", "ibot"):
            self.head(loss).begin_step(step)

    def head(self, loss: Loss) -> MlpHead | RmlpHead:
        """The head that projects for this loss at the current step."""
        if loss in self.rmlp and self.step >= self.rmlp_start:
            return cast(RmlpHead, self.rmlp[loss])
        if loss == "ibot" and self.ibot_head is not None:
            return self.ibot_head
        assert self.dino_head is not None
        return self.dino_head

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
            groups = self.backbone([self._pixels(batch.global_crops)])
        cls_global = groups[0].cls
        patches = groups[0].patches.flatten(0, 1).index_select(0, batch.mask_indices)
        dino, ibot = self._project(torch.cat([group.cls for group in groups]), patches)
        return {
            "cls": cls_global,
            "dino_features": dino.features,
            "dino_prototypes": dino.prototypes,
            "ibot_features": ibot.features,
            "ibot_prototypes": ibot.prototypes,
        }

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
        )
        return features

    def _project(self, cls: Tensor, patches: Tensor) -> tuple[Projection, Projection]:
        """Both projections; a shared head runs once, on all rows."""
        dino, ibot = self.head("dino"), self.head("ibot")
        if dino is not ibot:
            return dino(cls), ibot(patches)
        first, second = dino(torch.cat([cls, patches])).split([len(cls), len(patches)])
        return first, second


def branch_output(tensors: dict[str, Tensor]) -> BranchOutput:
    """The typed view of what `SSLBranch.forward` returns."""
    return BranchOutput(
        tensors["cls"],
        Projection(tensors["dino_features"], tensors["dino_prototypes"]),
        Projection(tensors["ibot_features"], tensors["ibot_prototypes"]),
    )
