"""The single-device engine and the method's step: clipping, EMA, precision, accumulation, changing heads."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from pretrain.config.schema import EngineConfig, HeadConfig, IbotHeadConfig, LossConfig, RmlpConfig
from pretrain.engines.single import SingleEngine, clip_gradients
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.method.outputs import share_prototypes
from pretrain.models.init import init_weights
from pretrain.optim.schedules import Schedules
from tests.small import random_batch, small_config


def build(cfg):
    student, teacher = SSLBranch(cfg, "student"), SSLBranch(cfg, "teacher")
    init_weights(student, seed=0)
    teacher.load_state_dict(student.state_dict())
    method = DinoV2(cfg)
    return SingleEngine(student, teacher, method, cfg.optim, cfg.engine, torch.device("cpu")), method


def train_step(engine, method, cfg, batches, step):
    values = Schedules(cfg).at(step)
    engine.begin_step(step, values)
    outputs = [engine.teacher(batch) for batch in batches]
    targets = method.targets(outputs, [b.mask_weights for b in batches], values.teacher_temp, step)
    total = 0.0
    for batch, target in zip(batches, targets, strict=True):
        terms = method.losses(engine.student(batch), target, batch)
        engine.backward(terms.total / len(batches))
        total += terms.total.item() / len(batches)
    result = engine.step()
    method.commit(result.good)
    engine.update_teacher(values.momentum)
    return total, result.grad_norms


def joined(batches):
    """Batches as one micro-batch of several groups: crop-major over all images."""
    size, first = batches[0].num_images, batches[0]

    def rows(name, count):
        parts = [getattr(b, name).unflatten(0, (count, size)) for b in batches]
        return torch.cat(parts, dim=1).flatten(0, 1)

    masks = rows("masks", 2)
    weights = (1 / masks.sum(1).clamp(min=1).float()).repeat_interleave(masks.sum(1))
    return replace(
        first,
        global_crops=rows("global_crops", 2),
        local_crops=rows("local_crops", len(first.local_crops) // size),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=weights,
        group_size=size,
    )


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("kind", ["mlp", "rmlp"])
def test_padded_masks_change_nothing_but_rounding(centering, kind):
    head = HeadConfig(kind=kind, prototypes=40, hidden_dim=32, bottleneck_dim=16)
    cfg = small_config(loss=LossConfig(centering=centering), dino_head=head, rmlp=RmlpConfig(outputs=48))
    exact, padded = build(cfg), build(cfg)
    for step in range(3):
        batch = random_batch(cfg, 4, seed=step)
        columns = {name: pad(getattr(batch, name), (0, 9)) for name in ("mask_indices", "mask_weights")}
        whole, norms = train_step(*exact, cfg, [batch], step)
        other, others = train_step(*padded, cfg, [replace(batch, **columns)], step)
        assert other == pytest.approx(whole, rel=1e-6)
        assert {k: v.item() for k, v in others.items()} == pytest.approx(
            {k: v.item() for k, v in norms.items()}, rel=1e-5
        )


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("shared", [True, False])
def test_accumulation_equals_one_batch(centering, shared):
    heads = {"prototypes": 40, "hidden_dim": 32, "bottleneck_dim": 16}
    ibot = IbotHeadConfig(shared=shared, **heads)
    cfg = small_config(loss=LossConfig(centering=centering), ibot_head=ibot)
    batches = [random_batch(cfg, 4, seed=s) for s in (0, 1)]
    one, two = build(cfg), build(cfg)
    for step in range(3):
        whole, norms = train_step(*one, cfg, [joined(batches)], step)
        parts, other = train_step(*two, cfg, batches, step)
        assert whole == pytest.approx(parts, rel=1e-5)
        assert {k: v.item() for k, v in norms.items()} == pytest.approx(
            {k: v.item() for k, v in other.items()}, rel=1e-4
        )


def test_each_sub_module_is_clipped_on_its_own():
    cfg = small_config()
    engine, method = build(cfg)
    batch = random_batch(cfg, 4)
    engine.begin_step(0, Schedules(cfg).at(0))
    targets = method.targets([engine.teacher(batch)], [batch.mask_weights], 0.04, 0)
    engine.backward(method.losses(engine.student(batch), targets[0], batch).total * 100)
    student = engine.branches["student"]
    for child in (student.backbone, student.dino_head):
        parameters = list(child.parameters())
        before = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        norm = clip_gradients(parameters, 3.0)
        after = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        assert norm.item() == pytest.approx(before.norm().item(), rel=1e-5)
        assert norm > 3
        torch.testing.assert_close(after, before * (3 / norm), rtol=1e-4, atol=1e-6)


def test_no_clipping_when_the_limit_is_zero():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 7.0)
    assert clip_gradients([parameter], 0.0).item() == pytest.approx(7 * 3**0.5)
    assert parameter.grad.tolist() == [7, 7, 7]


def test_teacher_follows_the_student():
    cfg = small_config()
    engine, method = build(cfg)
    batch = random_batch(cfg, 4)
    train_step(engine, method, cfg, [batch], 0)
    before = {k: v.clone() for k, v in engine.full_state_dict("teacher").items()}
    train_step(engine, method, cfg, [batch], 1)
    momentum = Schedules(cfg).at(1).momentum
    student = engine.full_state_dict("student")
    for key, value in engine.full_state_dict("teacher").items():
        torch.testing.assert_close(value, momentum * before[key] + (1 - momentum) * student[key])
    assert not any(p.requires_grad for p in engine.branches["teacher"].parameters())


def test_bf16_keeps_parameters_and_losses_in_fp32():
    fp32, bf16 = small_config(), small_config(engine=EngineConfig(device="cpu", precision="bf16"))
    losses = []
    for cfg in (fp32, bf16):
        engine, method = build(cfg)
        batch = random_batch(cfg, 4)
        out = engine.teacher(batch)
        assert out.dino.logits().dtype == torch.float32
        losses.append(train_step(engine, method, cfg, [batch], 0)[0])
        assert all(value.dtype == torch.float32 for value in engine.full_state_dict("student").values())
    assert engine.teacher(batch).dino.features.dtype == torch.bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]


def test_micro_batches_share_one_copy_of_the_teachers_prototypes():
    cfg = small_config()
    engine, _ = build(cfg)
    outputs = share_prototypes(engine.teacher(random_batch(cfg, 4, seed=s)) for s in range(3))
    assert len({out.dino.prototypes.data_ptr() for out in outputs}) == 1
    assert len({out.dino.features.data_ptr() for out in outputs}) == 3


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_a_batch_without_masked_patches_has_no_ibot_loss(centering):
    cfg = small_config(loss=LossConfig(centering=centering))
    engine, method = build(cfg)
    batch = random_batch(cfg, 4)
    padded = replace(
        batch,
        masks=torch.zeros_like(batch.masks),
        mask_indices=torch.zeros(1, dtype=torch.int64),
        mask_weights=torch.zeros(1),
    )
    before = {name: value.clone() for name, value in method.state_dict().items()}
    engine.begin_step(0, Schedules(cfg).at(0))
    targets = method.targets([engine.teacher(padded)], [padded.mask_weights], 0.04, 0)
    terms = method.losses(engine.student(padded), targets[0], padded)
    assert terms.parts["ibot"].item() == 0
    assert torch.isfinite(terms.total)
    method.commit(torch.tensor(True))
    assert all(
        torch.equal(value, before[name]) for name, value in method.state_dict().items() if "ibot" in name
    )


def test_rmlp_takes_over_at_its_start_step():
    head = HeadConfig(kind="rmlp", prototypes=40, hidden_dim=32, bottleneck_dim=16)
    cfg = small_config(dino_head=head, rmlp=RmlpConfig(outputs=64, start_step=2))
    engine, method = build(cfg)
    batch = random_batch(cfg, 4)
    kinds = []
    for step in range(4):
        train_step(engine, method, cfg, [batch], step)
        kinds.append(engine.teacher(batch).dino.prototypes.shape)
        if step == 1:
            trained = engine.full_state_dict("student")["dino_head.mlp.0.weight"]
    assert kinds == [(40, 16), (40, 16), (64, 16), (64, 16)]
    assert method.centers["dino"].center.shape == (40,)
    assert method.centers["dino_rmlp"].center.any()
    assert torch.equal(engine.full_state_dict("student")["dino_head.mlp.0.weight"], trained)


def test_rmlp_alone_leaves_only_the_backbone_to_optimise():
    cfg = small_config(dino_head=HeadConfig(kind="rmlp"), rmlp=RmlpConfig(outputs=64))
    engine, method = build(cfg)
    _, norms = train_step(engine, method, cfg, [random_batch(cfg, 4)], 0)
    assert list(norms) == ["backbone"]
    assert all(name.startswith("backbone.") for name in engine.full_state_dict("student"))


def test_state_round_trip_continues_bit_for_bit():
    cfg = small_config()
    one, two = build(cfg), build(cfg)
    batches = [random_batch(cfg, 4, seed=s) for s in range(4)]
    for step in range(2):
        train_step(*one, cfg, [batches[step]], step)
    saved = {part: {k: v.clone() for k, v in t.items()} for part, t in one[0].state_dict().items()}
    two[0].load_state_dict(saved)
    for step in range(2, 4):
        assert (
            train_step(*one, cfg, [batches[step]], step)[0] == train_step(*two, cfg, [batches[step]], step)[0]
        )
    for part, tensors in one[0].state_dict().items():
        for key, value in tensors.items():
            assert torch.equal(value, two[0].state_dict()[part][key]), key


def test_a_resume_while_the_backbone_is_frozen_continues_bit_for_bit():
    cfg = small_config()
    optim = replace(cfg.optim, freeze_backbone_steps=3, weight_decay=0.4, warmup_steps=0)
    cfg = replace(cfg, optim=optim)
    batches = [random_batch(cfg, 4, seed=s) for s in range(5)]
    one, two = build(cfg), build(cfg)
    for step in range(2):
        train_step(*one, cfg, [batches[step]], step)
    saved = {part: {k: v.clone() for k, v in t.items()} for part, t in one[0].state_dict().items()}
    assert saved["optim"]["backbone.norm.weight.exp_avg"].any()  # moments go on
    two[0].load_state_dict(saved)
    for step in range(2, 5):
        for engine, method in (one, two):
            train_step(engine, method, cfg, [batches[step]], step)
        frozen = torch.equal(
            one[0].full_state_dict("student")["backbone.pos_embed"],
            saved["model"]["student.backbone.pos_embed"],
        )
        assert frozen == (step < 3)
    for part, tensors in one[0].state_dict().items():
        for key, value in tensors.items():
            assert torch.equal(value, two[0].state_dict()[part][key]), key
