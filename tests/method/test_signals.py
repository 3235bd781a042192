"""Signals against naive loops, in degenerate cases, and on the outputs of a real step."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from pretrain.batch import Batch
from pretrain.engines.single import SingleEngine
from pretrain.losses.centering import Target
from pretrain.method import signals as module
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.method.outputs import BranchOutput, Targets
from pretrain.method.signals import effective_rank, mean_cosine, norms, signals
from pretrain.models.init import init_weights
from pretrain.optim.schedules import Schedules
from pretrain.projection import Projection
from tests.small import random_batch, small_config

PROTOTYPES, WIDTH, BOTTLENECK = 7, 6, 4
Step = tuple[BranchOutput, BranchOutput, Targets, Batch]


def made_step(
    images: int, seed: int = 0, patches: int | None = None, dtype: torch.dtype = torch.float32
) -> Step:
    """Random outputs of a micro-batch; two rows of padding follow the masked patches, far from all others."""
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(small_config(), images, seed)
    real = len(batch.mask_weights) if patches is None else patches
    weights = torch.cat([torch.rand(real, generator=generator) + 0.1, torch.zeros(2)])
    batch = Batch(**{**vars(batch), "mask_weights": weights})

    def projection(rows: int) -> Projection:
        features, prototypes = (torch.randn(n, BOTTLENECK, generator=generator) for n in (rows, PROTOTYPES))
        return Projection(features.to(dtype), prototypes.to(dtype))

    def branch(rows: int) -> BranchOutput:
        ibot = projection(len(weights))
        ibot.features[real:] = 100.0
        return BranchOutput(torch.randn(2 * images, WIDTH, generator=generator), projection(rows), ibot)

    student, teacher = branch(5 * images), branch(2 * images)
    offset = torch.randn(PROTOTYPES, generator=generator)
    return (
        student,
        teacher,
        Targets(Target(teacher.dino, offset, 0.5), Target(teacher.ibot, offset, 0.7)),
        batch,
    )


def values_of(step: Step) -> dict[str, float]:
    found = signals(*step)
    assert all(value.shape == () and value.dtype == torch.float32 for value in found.values())
    assert not any(value.requires_grad for value in found.values())
    return {name.removeprefix("signal/"): value.item() for name, value in found.items()}


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def naive_targets(prefix: str, rows: list[list[float]]) -> dict[str, float]:
    mean, each = [sum(k) / len(rows) for k in zip(*rows, strict=True)], sum(map(entropy, rows)) / len(rows)
    return {
        f"{prefix}teacher_entropy": each,
        f"{prefix}teacher_entropy_share": each / math.log(PROTOTYPES),
        f"{prefix}prototypes_used": math.exp(entropy(mean)),
        f"{prefix}target_information": entropy(mean) - each,
    }


def naive_cosine(rows: Tensor) -> float:
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    return sum(torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i, j in pairs) / len(pairs)


def exact_rank(rows: Tensor) -> float:
    values = torch.linalg.svdvals((rows - rows.mean(0)).double())
    return math.exp(entropy((values / values.sum()).tolist()))


def naive_agreement(student: BranchOutput, targets: list[list[float]], images: int) -> float:
    logits = student.dino.logits().tolist()
    hits = 0
    for crop in (0, 1):
        for image in range(images):
            mine, other = logits[crop * images + image], targets[(1 - crop) * images + image]
            hits += mine.index(max(mine)) == other.index(max(other))
    return hits / (2 * images)


def naive_masks(masks: Tensor) -> dict[str, float]:
    shares = [sum(row) / len(row) for row in masks.tolist()]
    masked = [share for share in shares if share > 0]
    return {
        "masked_crops": len(masked) / len(shares),
        "masked_share": sum(masked) / len(masked),
        "masked_patches": sum(sum(row) for row in masks.tolist()),
    }


@pytest.mark.parametrize("seed", range(3))
def test_signals_equal_naive_loops(seed: int) -> None:
    student, teacher, targets, batch = step = made_step(5, seed)
    rows = targets.dino.probabilities().tolist()
    patches = [
        row
        for row, weight in zip(targets.ibot.probabilities().tolist(), batch.mask_weights, strict=True)
        if weight > 0
    ]
    expected = {
        **naive_targets("", rows),
        **naive_targets("patch_", patches),
        "feature_rank": exact_rank(teacher.cls),
        "teacher_cosine": naive_cosine(teacher.cls[:5]),
        "student_cosine": naive_cosine(student.cls[:5]),
        "agreement": naive_agreement(student, rows, 5),
        **naive_masks(batch.masks),
    }
    found = values_of(step)
    assert found.pop("feature_rank") == pytest.approx(expected.pop("feature_rank"), rel=1e-2)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_many_patches_are_represented_by_a_few_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    step = made_step(4, patches=30)
    monkeypatch.setattr(module, "MAX_ROWS", 11)
    rows = step[2].ibot.probabilities().tolist()[:30:3]
    assert values_of(step)["patch_teacher_entropy"] == pytest.approx(
        naive_targets("", rows)["teacher_entropy"], rel=1e-4
    )


def test_agreement_is_with_the_other_crop() -> None:
    student, _, _, batch = made_step(3)
    prototypes = torch.eye(PROTOTYPES)
    kinds = torch.tensor([0, 1, 2, 3, 4, 5])  # the targets of crop 0 of three images, then of crop 1
    teacher = Projection(prototypes[kinds], prototypes)
    target = Target(teacher, torch.zeros(PROTOTYPES), 0.1)
    for order, share in (([3, 4, 5, 0, 1, 2], 1.0), ([0, 1, 2, 3, 4, 5], 0.0), ([3, 4, 5, 6, 6, 6], 0.5)):
        mine = Projection(torch.cat([prototypes[order], prototypes[:1].expand(9, -1)]), prototypes)
        out = BranchOutput(student.cls, mine, student.ibot)
        teacher_out = BranchOutput(student.cls, teacher, student.ibot)
        targets = Targets(target, Target(student.ibot, torch.zeros(PROTOTYPES), 0.1))
        assert signals(out, teacher_out, targets, batch)["signal/agreement"].item() == share


def collapsed(step: Step) -> Step:
    """The same with every feature the same."""
    student, teacher, targets, batch = step

    def same(x: Tensor) -> Tensor:
        return x[:1].expand_as(x).clone()

    def flat(out: BranchOutput) -> BranchOutput:
        dino, ibot = (Projection(same(p.features), p.prototypes) for p in (out.dino, out.ibot))
        return BranchOutput(same(out.cls), dino, ibot)

    student, teacher = flat(student), flat(teacher)
    dino, ibot = targets.dino, targets.ibot
    targets = Targets(
        Target(teacher.dino, dino.offset, dino.temp), Target(teacher.ibot, ibot.offset, ibot.temp)
    )
    return student, teacher, targets, batch


def test_equal_features_are_a_collapse_in_every_signal() -> None:
    found = values_of(collapsed(made_step(6)))
    assert found["feature_rank"] == pytest.approx(1)
    assert found["teacher_cosine"] == pytest.approx(1) == found["student_cosine"]
    assert found["target_information"] < 1e-6 and found["patch_target_information"] < 1e-6
    assert found["prototypes_used"] == pytest.approx(math.exp(found["teacher_entropy"]), rel=1e-5)


@pytest.mark.parametrize("images", [1, 2])
def test_few_images_give_finite_signals(images: int) -> None:
    assert all(math.isfinite(value) for value in values_of(made_step(images)).values())
    assert values_of(made_step(1))["teacher_cosine"] == 0


def test_one_prototype_gives_finite_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PROTOTYPES", 1)
    found = values_of(made_step(4))
    assert all(math.isfinite(value) for value in found.values())
    assert found["prototypes_used"] == 1 == found["agreement"]


def test_no_masked_patch_leaves_the_patch_signals_at_zero() -> None:
    student, teacher, targets, batch = made_step(4, patches=0)
    batch = Batch(**{**vars(batch), "masks": torch.zeros_like(batch.masks)})
    found = values_of((student, teacher, targets, batch))
    zero = [name for name in found if name.startswith(("patch_", "masked_"))]
    assert len(zero) == 7 and [found[name] for name in zero] == [0] * 7
    assert all(math.isfinite(value) for value in found.values())


def test_features_that_are_not_numbers_show() -> None:
    student, teacher, targets, batch = made_step(4)
    teacher.cls[3] = torch.nan
    found = values_of((student, teacher, targets, batch))
    assert math.isnan(found["feature_rank"]) and math.isnan(found["teacher_cosine"])


@pytest.mark.parametrize("shape", [(16, 384), (256, 96), (40, 40)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_the_rank_without_a_decomposition_is_close_to_the_exact_one(
    shape: tuple[int, int], decay: float
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    x = u * torch.arange(1, len(values) + 1) ** -decay @ v
    assert effective_rank(x).item() == pytest.approx(exact_rank(x), rel=1e-2)
    assert effective_rank(x + 3).item() == pytest.approx(exact_rank(x), rel=1e-2)  # centred


def test_rounding_is_not_rank() -> None:
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 10
    assert effective_rank((row * torch.ones(40, 1)) * (1 + 1e-7 * torch.arange(40).unsqueeze(1))) < 1.5
    assert effective_rank(row.expand(40, -1)) == 1


def test_the_cosine_counts_pairs_of_different_rows() -> None:
    assert mean_cosine(torch.eye(3)).item() == pytest.approx(0, abs=1e-6)
    assert mean_cosine(torch.tensor([[1.0, 0], [-2, 0]])).item() == pytest.approx(-1)
    assert mean_cosine(torch.tensor([[1.0, 1], [5, 5]]).bfloat16()).item() == pytest.approx(1)


def test_no_value_is_copied_to_the_host() -> None:
    """Tensors without data stand in for a device: asking for a value fails on them."""
    mode = FakeTensorMode()
    fake = mode.from_tensor

    def away(p: Projection) -> Projection:
        return Projection(fake(p.features), fake(p.prototypes))

    student, teacher, targets, batch = made_step(4)
    student, teacher = (BranchOutput(fake(o.cls), away(o.dino), away(o.ibot)) for o in (student, teacher))
    dino, ibot = (Target(away(t.projection), fake(t.offset), t.temp) for t in (targets.dino, targets.ibot))
    with mode:
        found = signals(student, teacher, Targets(dino, ibot), batch._map(fake))
        assert all(value.shape == () for value in found.values())
        with pytest.raises(RuntimeError):
            found["signal/agreement"].item()


def test_low_precision_and_autocast_change_nothing() -> None:
    step = made_step(4, dtype=torch.bfloat16)
    plain = values_of(step)
    with torch.autocast("cpu", torch.bfloat16):
        assert values_of(step) == plain


def engine_after_backward() -> tuple[SingleEngine, dict[str, Tensor]]:
    cfg = small_config()
    student, teacher = SSLBranch(cfg, "student"), SSLBranch(cfg, "teacher")
    init_weights(student, seed=0)
    teacher.load_state_dict(student.state_dict())
    method = DinoV2(cfg)
    engine = SingleEngine(student, teacher, method, cfg.optim, cfg.engine, torch.device("cpu"))
    batch = random_batch(cfg, 4)
    engine.begin_step(0, Schedules(cfg).at(0))
    seen = engine.teacher(batch)
    targets = method.targets([seen], [batch.mask_weights], 0.04, 0)
    output = engine.student(batch)
    engine.backward(method.losses(output, targets[0], batch).total)
    return engine, signals(output, seen, targets[0], batch)


def test_a_real_step_has_finite_signals_and_norms_of_every_layer() -> None:
    engine, found = engine_after_backward()
    assert all(value.isfinite() for value in found.values())
    student = engine.branches["student"]
    layers = norms(student)
    assert all(value.isfinite() and not value.requires_grad for value in layers.values())
    expected = torch.stack([p.norm() for p in student.backbone.blocks[1].attn.parameters()]).norm()
    assert layers["weight_norm/backbone.blocks.1.attn"].item() == pytest.approx(expected.item())
    gradients = [p.grad for p in student.backbone.blocks[0].mlp.parameters()]
    expected = torch.cat([g.flatten() for g in gradients]).norm()
    assert layers["gradient_norm/backbone.blocks.0.mlp"].item() == pytest.approx(expected.item(), rel=1e-5)
    whole = torch.stack([v for k, v in layers.items() if k.startswith("weight_norm/")]).norm()
    assert whole.item() == pytest.approx(torch.stack([p.norm() for p in student.parameters()]).norm().item())
    units = {name.removeprefix("weight_norm/") for name in layers if name.startswith("weight_norm/")}
    blocks = {
        f"backbone.blocks.{i}.{part}"
        for i in (0, 1)
        for part in ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
    }
    single = {f"backbone.{part}" for part in ("cls_token", "pos_embed", "mask_token", "patch_embed", "norm")}
    assert units == blocks | single | {"dino_head.mlp", "dino_head.last_layer"}


def test_norms_without_gradients_are_those_of_the_weights() -> None:
    layers = nn.ModuleDict({"head": nn.Linear(3, 2)})
    assert set(norms(layers)) == {"weight_norm/head.weight", "weight_norm/head.bias"}
