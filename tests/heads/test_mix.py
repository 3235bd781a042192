"""A trainable and a randomized head mixed: its logits, its gradients, and its place in a training step."""

from dataclasses import replace

import pytest
import torch

from pretrain.config.derived import rmlp_strength
from pretrain.config.schema import HeadConfig, LossConfig, RmlpConfig
from pretrain.engines.single import SingleEngine
from pretrain.heads import MlpHead, RmlpHead, mix
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.models.init import init_weights
from pretrain.optim.schedules import Schedules
from tests.small import random_batch, small_config

DIM, OUTPUTS = 24, 40
HEAD = HeadConfig(kind="mix", prototypes=OUTPUTS, hidden_dim=32, bottleneck_dim=16)
RMLP = RmlpConfig(outputs=OUTPUTS)


def both_heads() -> tuple[MlpHead, RmlpHead]:
    mlp, rmlp = MlpHead(DIM, HEAD), RmlpHead(DIM, RMLP, 0, "dino", "student")
    init_weights(mlp, seed=0)
    rmlp.begin_step(0)
    return mlp, rmlp


def mix_config(**rmlp):
    return small_config(dino_head=HEAD, rmlp=replace(RMLP, **rmlp))


def build(cfg) -> tuple[SingleEngine, DinoV2]:
    student, teacher, method = SSLBranch(cfg, "student"), SSLBranch(cfg, "teacher"), DinoV2(cfg)
    init_weights(student, 0)
    teacher.load_state_dict(student.state_dict())
    return SingleEngine(student, teacher, method, cfg.optim, cfg.engine, torch.device("cpu")), method


def step_once(engine, method, cfg, step: int):
    batch, values = random_batch(cfg, 4, seed=step), Schedules(cfg).at(step)
    engine.begin_step(step, values)
    targets = method.targets([engine.teacher(batch)], [batch.mask_weights], values.teacher_temp, step)
    student = engine.student(batch)
    loss = method.losses(student, targets[0], batch).total
    engine.backward(loss)
    result = engine.step()
    method.commit(result.good)
    engine.update_teacher(values.momentum)
    return loss.item(), result, student, targets[0]


def test_mixed_logits_are_the_weighted_sum():
    (mlp, rmlp), x = both_heads(), torch.randn(9, DIM)
    mixed = mix(mlp(x), rmlp(x), 0.3)
    assert mixed.features.shape == (9, 16 + 16) and mixed.prototypes.shape == (OUTPUTS, 32)
    expected = 0.7 * mlp(x).logits() + 0.3 * rmlp(x).logits()
    torch.testing.assert_close(mixed.logits(), expected)


def test_a_share_of_0_or_1_is_one_head_bit_for_bit():
    (mlp, rmlp), x = both_heads(), torch.randn(9, DIM)
    assert torch.equal(mix(mlp(x), rmlp(x), 0).logits(), mlp(x).logits())
    alone = mix(mlp(x), rmlp(x), 1)
    assert torch.equal(alone.logits(), rmlp(x).logits())
    alone.logits().square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in mlp.parameters())


def test_gradients_reach_the_trainable_head_and_the_tokens():
    (mlp, rmlp), x = both_heads(), torch.randn(9, DIM, requires_grad=True)
    mix(mlp(x), rmlp(x), 0.5).logits().square().sum().backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad.any() for p in mlp.parameters())


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_strength_goes_from_start_to_end_and_stays_there(schedule, middle):
    cfg = mix_config(
        schedule=schedule, amplitude_end=1.0, mix=0.0, mix_end=1.0, start_step=3, schedule_steps=11
    )
    at = [rmlp_strength(cfg, step) for step in range(20)]
    assert {s.mix for s in at[:4]} == {0.0} and {s.mix for s in at[13:]} == {1.0}
    assert at[3].amplitude == 5.0 and at[13].amplitude == 1.0
    assert at[8].mix == pytest.approx(middle)
    assert sorted(s.mix for s in at) == [s.mix for s in at]
    assert (at[5].mix == pytest.approx(0.2)) == (schedule == "linear")
    whole = replace(cfg, rmlp=replace(cfg.rmlp, schedule_steps=0))
    assert rmlp_strength(whole, cfg.run.steps - 2).mix < 1 == rmlp_strength(whole, cfg.run.steps - 1).mix


def test_a_constant_strength_is_the_same_at_every_step():
    assert {rmlp_strength(mix_config(mix=0.3), step) for step in range(30)} == {(5.0, 0.3)}


def test_the_trainable_part_is_optimised_followed_by_the_teacher_and_saved():
    cfg = mix_config()
    engine, method = build(cfg)
    before = {name: engine.full_state_dict(name) for name in ("student", "teacher")}
    for step in range(3):
        _, result, student, _ = step_once(engine, method, cfg, step)
    assert list(result.grad_norms) == ["backbone", "dino_head"]
    assert student.ibot.prototypes.shape == (OUTPUTS, 32)
    for name, old in before.items():
        new = engine.full_state_dict(name)
        assert {"dino_head.mlp.0.weight", "dino_head.last_layer.weight_v"} < new.keys()
        assert all(not torch.equal(new[key], value) for key, value in old.items() if "weight" in key), name
    assert method.centers["dino_rmlp"].center.any()
    assert list(method.centers) == ["dino_rmlp", "ibot_rmlp"]


def test_resumed_in_the_middle_of_both_schedules_bit_for_bit():
    cfg = mix_config(schedule="cosine", amplitude_end=1.0, mix=0.2, mix_end=0.9, resample_every=3)
    one, two = build(cfg), build(cfg)
    for step in range(4):
        step_once(*one, cfg, step)
        drawn = one[0].branches["teacher"].rmlp["dino"].layers.drawn
        assert drawn[:2] == (step // 3, rmlp_strength(cfg, step).amplitude)
    saved = {part: {k: v.clone() for k, v in t.items()} for part, t in one[0].state_dict().items()}
    two[0].load_state_dict(saved)
    for step in range(4, 7):
        assert step_once(*one, cfg, step)[0] == step_once(*two, cfg, step)[0]


def test_heads_that_share_a_draw_run_once():
    cfg = small_config(
        dino_head=replace(HEAD, kind="rmlp"), rmlp=replace(RMLP, share_dino_ibot=True, outputs=64)
    )
    branch = SSLBranch(cfg, "student")
    init_weights(branch, 0)
    branch.begin_step(0)
    out = branch(random_batch(cfg, 4))
    assert "ibot_prototypes" not in out


@pytest.mark.parametrize("kind", ["rmlp", "mix"])
def test_sinkhorn_fills_only_outputs_that_hold_a_signal(kind):
    cfg = small_config(dino_head=replace(HEAD, kind=kind), rmlp=RMLP, loss=LossConfig(centering="sinkhorn"))
    engine, method = build(cfg)
    _, result, _, targets = step_once(engine, method, cfg, 0)
    mass = targets.dino.probabilities().sum(0)
    assert result.good and mass.sum().item() == pytest.approx(8, rel=1e-5)
    first = 2 * DIM // 3
    assert mass[:first].min() > 0.01
    assert not mass[first:].any() if kind == "rmlp" else mass[first:].min() > 0.01
