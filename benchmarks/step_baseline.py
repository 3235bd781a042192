"""The plain baseline of `step.py`: one DINOv2 training step in the way the original code computes it.

Nothing here is clever. The backbone runs once per crop group, with a linear and an SDPA call for each; masked
patches pass the head in a zero-padded buffer of a fixed upper bound; targets and log-softmaxes are whole fp32
matrices of K columns; each local crop meets each teacher crop on its own; AdamW and EMA are lists of plain
operations; every loss is read by the host. Shapes: the legend of `pretrain.batch`.
"""

from collections.abc import Callable

import torch
from step_baseline_model import PlainBranch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.batch import Batch
from pretrain.config.derived import vit_shape
from pretrain.config.schema import Config
from pretrain.optim.groups import parameter_groups, set_step_values
from pretrain.optim.schedules import StepValues

Mark = Callable[[str], None]  # called with a part's name when that part of the step is done


class Baseline:
    """Student, teacher, centres and optimizer, with the initial weights of an `SSLBranch`."""

    def __init__(self, cfg: Config, weights: dict[str, Tensor], device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.student = PlainBranch(cfg, "student", device)
        self.teacher = PlainBranch(cfg, "teacher", device)
        for branch in (self.student, self.teacher):
            branch.load_state_dict(weights)
            branch.to(device)
        self.teacher.requires_grad_(False).eval()
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.engine.precision == "bf16")
        groups = parameter_groups(self.student.named_parameters(), vit_shape(cfg.model).depth, cfg.optim)
        betas = cfg.optim.beta1, cfg.optim.beta2
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, foreach=True)
        self.ema = list(self.teacher.parameters()), list(self.student.parameters())
        outputs = cfg.rmlp.outputs if self.student.random else cfg.dino_head.prototypes
        self.centers = {loss: torch.zeros(1, outputs, device=device) for loss in ("dino", "ibot")}

    def step(self, batch: Batch, step: int, values: StepValues, mark: Mark) -> dict[str, float]:
        """One training step; its losses and gradient norms."""
        self.begin(step, values)
        with torch.no_grad():
            features = self.teacher_features(batch)
            mark("teacher")
            targets = self.targets(features, len(batch.mask_indices), values.teacher_temp)
            mark("targets")
        cls, features = self.student_features(batch)
        mark("student forward")
        losses = self.losses(cls, features, targets, batch)
        mark("losses")
        losses["total"].backward()
        mark("backward")
        norms = self.update()
        mark("clip + optimizer")
        self.update_teacher(values.momentum)
        mark("EMA")
        logged = {name: value.item() for name, value in {**losses, **norms}.items()}  # a sync for each
        mark("log")
        return logged

    def begin(self, step: int, values: StepValues) -> None:
        """Learning rates, no gradients, new random heads."""
        set_step_values(self.optimizer.param_groups, values)
        self.optimizer.zero_grad(set_to_none=True)
        for branch in (self.student, self.teacher):
            for head in branch.random.values():
                head.draw(step)

    def padded(self, patches: Tensor, batch: Batch) -> Tensor:
        """The masked patches (M, D) of (2B, N, D) in a buffer of fixed length, zeros behind them."""
        buffer = patches.new_zeros(masks_upper_bound(self.cfg, batch.num_images), patches.shape[-1])
        buffer[: len(batch.mask_indices)] = patches.flatten(0, 1).index_select(0, batch.mask_indices)
        return buffer

    def teacher_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Bottlenecks of the class tokens, second crop first, and of the padded masked patches."""
        with self.autocast:
            cls, patches = self.teacher.backbone(batch.global_crops)
            first, second = cls.chunk(2)
            return self.teacher.bottleneck(torch.cat([second, first]), self.padded(patches, batch))

    def targets(self, features: tuple[Tensor, Tensor], masked: int, temp: float) -> tuple[Tensor, Tensor]:
        """Probabilities (2B, K), second crop first, and (M, K)."""
        with self.autocast:
            cls, patches = self.teacher.logits(*features)
        return self.centered("dino", cls, temp), self.centered("ibot", patches[:masked], temp)

    def centered(self, loss: str, logits: Tensor, temp: float) -> Tensor:
        """Targets (rows, K) float32 from the teacher's logits."""
        logits = logits.float()
        if self.cfg.loss.centering == "sinkhorn":
            return sinkhorn(logits, temp, self.cfg.loss.sinkhorn_iterations)
        targets = F.softmax((logits - self.centers[loss]) / temp, dim=-1)
        momentum = self.cfg.loss.center_momentum
        mean = logits.mean(0, keepdim=True)
        self.centers[loss] = self.centers[loss] * momentum + mean * (1 - momentum)
        return targets

    def student_features(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Class tokens of the global crops, then the bottlenecks: local and global crops, patches."""
        with self.autocast:
            cls, patches = self.student.backbone(batch.global_crops, batch.masks, batch.drop_global)
            local, _ = self.student.backbone(batch.local_crops, None, batch.drop_local)
            return cls, self.student.bottleneck(torch.cat([local, cls]), self.padded(patches, batch))

    def losses(
        self, cls: Tensor, features: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """All terms and their weighted total."""
        size, masked, weights = batch.num_images, len(batch.mask_indices), self.cfg.loss
        with self.autocast:
            cls_logits, patch_logits = self.student.logits(*features)
        local, both = cls_logits.split([len(batch.local_crops), 2 * size])
        temp, pairs = weights.student_temp, 2 + 2 * (len(local) // size)
        parts = {
            "dino_global": pair_loss([both], [targets[0]], temp) * 2 / pairs,
            "dino_local": pair_loss(local.chunk(len(local) // size), targets[0].chunk(2), temp) / pairs,
            "ibot": patch_loss(patch_logits[:masked], targets[1], batch.mask_weights, 2 * size, temp),
            "koleo": sum((koleo(crop) for crop in cls.chunk(2)), torch.zeros((), device=self.device)),
        }
        total = weights.dino_weight * (parts["dino_global"] + parts["dino_local"])
        total = total + weights.ibot_weight * parts["ibot"] + weights.koleo_weight * parts["koleo"]
        return {"total": total, **parts}

    def update(self) -> dict[str, Tensor]:
        """Clip each sub-module, then AdamW; the norms before clipping."""
        limit = self.cfg.optim.clip_grad_norm
        norms = {
            f"grad_norm_{name}": nn.utils.clip_grad_norm_(child.parameters(), limit)
            for name, child in self.student.named_children()
        }
        self.optimizer.step()
        return norms

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student."""
        torch._foreach_mul_(self.ema[0], momentum)
        torch._foreach_add_(self.ema[0], self.ema[1], alpha=1 - momentum)


def masks_upper_bound(cfg: Config, images: int) -> int:
    """The most masked patches that the budgets of a group can add up to."""
    count = int(2 * images * cfg.mask.probability)
    low, high = cfg.mask.ratio
    patches = (cfg.data.global_crops.size // cfg.model.patch_size) ** 2
    return sum(int(patches * (low + (high - low) * (i + 1) / count)) for i in range(count))


def sinkhorn(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """(rows, K) targets: the whole matrix exponentiated, its rows and columns divided in place in turn."""
    plan = torch.exp(logits / temp).t()  # (K, rows)
    outputs, rows = plan.shape
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(dim=1, keepdim=True)
        plan /= outputs
        plan /= plan.sum(dim=0, keepdim=True)
        plan /= rows
    plan *= rows
    return plan.t()


def pair_loss(students: list[Tensor], teachers: list[Tensor], temp: float) -> Tensor:
    """Cross-entropy of every student crop (rows, K) with every teacher crop, means over rows summed."""
    total = torch.zeros((), device=students[0].device)
    for student in students:
        log_probabilities = F.log_softmax(student.float() / temp, dim=-1)
        for teacher in teachers:
            total = total - (teacher * log_probabilities).sum(-1).mean()
    return total


def patch_loss(student: Tensor, targets: Tensor, weights: Tensor, crops: int, temp: float) -> Tensor:
    """Weighted cross-entropy of masked patches (M, K), per crop."""
    rows = (targets * F.log_softmax(student.float() / temp, dim=-1)).sum(-1)
    return -(rows * weights).sum() / crops


def koleo(features: Tensor) -> Tensor:
    """-mean log distance to the nearest of (B, D)."""
    x = F.normalize(features.float(), dim=-1, eps=1e-8)
    with torch.no_grad():
        similarity = x @ x.t()
        nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
    return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()
