"""Numbers that tell a run that learns from one that has collapsed; docs/signals.md says how to read them.

Scalars of one micro-batch on the device: nothing here waits for the device, takes a gradient or talks to
other ranks. Shapes are those of `pretrain.batch`.
"""

import math
import re

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pretrain.batch import Batch
from pretrain.losses.centering import Target
from pretrain.method.outputs import BranchOutput, Targets
from pretrain.projection import Projection

MAX_ROWS = 256  # patches, and class tokens for the rank, that are looked at, spread evenly
RANK_ROUNDS = 8  # within 1 % of the exact rank
UNIT = re.compile(r"(?:.*\bblocks\.\d+\.|\w+\.)?\w+")  # the part of a parameter's name that names its layer


@torch.no_grad()
def signals(
    student: BranchOutput, teacher: BranchOutput, targets: Targets, batch: Batch
) -> dict[str, Tensor]:
    """The signals of one micro-batch, fp32 scalars on the device.

    Args:
        student: the student's output for the micro-batch.
        teacher: the teacher's.
        targets: what the teacher's output became.
        batch: the micro-batch.
    """
    size = batch.num_images
    with torch.autocast(batch.masks.device.type, enabled=False):
        rows = targets.dino.probabilities()  # (G*B, K)
        return {
            **_target_signals("", rows, torch.ones_like(rows[:, 0])),
            **(
                _target_signals("patch_", *_patch_targets(targets.ibot, batch.mask_weights))
                if targets.ibot
                else {}
            ),
            "signal/feature_rank": effective_rank(teacher.cls[:: -(-len(teacher.cls) // MAX_ROWS)]),
            "signal/teacher_cosine": mean_cosine(teacher.cls[:size]),
            "signal/student_cosine": mean_cosine(student.cls[:size]),
            "signal/agreement": _agreement(student.dino, rows),
            **_mask_signals(batch.masks),
        }


def _target_signals(prefix: str, rows: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What the targets (rows, K) of weight 1 (not 0) say; all 0 where there is no such row."""
    count, uniform = weights.sum(), math.log(rows.shape[1])
    entropy = (_entropy(rows) * weights).sum() / count.clamp(min=1)
    of_mean = _entropy((rows * weights.unsqueeze(1)).sum(0) / count.clamp(min=1))
    return {
        f"signal/{prefix}teacher_entropy": entropy,
        f"signal/{prefix}teacher_entropy_share": entropy / max(uniform, 1e-12),
        f"signal/{prefix}prototypes_used": torch.where(count == 0, 0.0, of_mean.exp()),
        # Mutual information of target and row: 0 when all targets are alike, sharp or flat.
        f"signal/{prefix}target_information": (of_mean - entropy).clamp(min=0),
    }


def _patch_targets(target: Target, weights: Tensor) -> tuple[Tensor, Tensor]:
    """At most `MAX_ROWS` of the masked patches' targets (rows, K), spread evenly; weight 0 marks padding."""
    step = -(-len(weights) // MAX_ROWS)
    features, prototypes = target.projection
    few = Target(Projection(features[::step], prototypes), target.offset, target.temp)
    return few.probabilities(), (weights[::step] > 0).float()


def _entropy(p: Tensor) -> Tensor:
    """Entropy in nats over the last axis, (..., K) to (...)."""
    return torch.special.entr(p).sum(-1)


def effective_rank(x: Tensor) -> Tensor:
    """Effective rank of the centred rows (n, D): exp of the entropy of their normalised singular values.

    1 when all rows are equal, and at most min(n - 1, D). `svdvals` makes the host wait for the device, so the
    singular values are those of alternating QR factorisations, which approach them from R to R (Stewart's
    QLP); what has not settled lies between values of its neighbours and hardly moves the entropy.
    """
    x = x.float()
    r = x - x.mean(0)
    r = r if len(r) > r.shape[1] else r.t()
    for _ in range(RANK_ROUNDS):
        r = torch.linalg.qr(r, mode="r").R.t()
    values = r.diagonal().abs()
    noise = torch.finfo(torch.float32).eps * x.norm() * 2  # what rounding leaves of equal rows
    values = torch.where(values <= noise, 0.0, values)  # NaN stays
    return _entropy(values / values.sum().clamp(min=1e-30)).exp()


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine between different rows of (n, D): 1 when all point one way, 0 for a single row."""
    x = normalize(x.float(), dim=-1)
    n = len(x)
    return (x.sum(0).square().sum() - x.square().sum()) / max(n * (n - 1), 1)


def _agreement(student: Projection, targets: Tensor) -> Tensor:
    """Share of global crops whose likeliest prototype is that of the target of the image's other crop."""
    mine = student.split([len(targets), len(student.features) - len(targets)])[0].logits().argmax(1)
    other = targets.argmax(1).unflatten(0, (2, -1)).flip(0).flatten()
    return (mine == other).float().mean()


def _mask_signals(masks: Tensor) -> dict[str, Tensor]:
    """How much of the global crops is hidden from the student, from masks (G*B, N)."""
    shares = masks.float().mean(1)
    masked = (shares > 0).float()
    return {
        "signal/masked_crops": masked.mean(),
        "signal/masked_share": shares.sum() / masked.sum().clamp(min=1),
        "signal/masked_patches": masks.sum().float(),
    }


def layer_name(parameter: str) -> str:
    """The layer that a parameter belongs to, by its name: `backbone.blocks.3.attn` and the like."""
    match = UNIT.match(parameter)
    return match.group() if match else parameter


@torch.no_grad()
def norms(model: nn.Module) -> dict[str, Tensor]:
    """Norms of the weights and, where there are any, of the gradients, per sub-module of each block.

    Names are `weight_norm/backbone.blocks.3.attn` and `gradient_norm/...`; gradients are there between
    `backward` and the optimizer's step.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        unit = layer_name(name)
        groups.setdefault(f"weight_norm/{unit}", []).append(parameter)
        if parameter.grad is not None:
            groups.setdefault(f"gradient_norm/{unit}", []).append(parameter.grad)
    return {name: torch.stack([t.float().norm() for t in tensors]).norm() for name, tensors in groups.items()}
