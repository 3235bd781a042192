"""Bad steps: skipped, counted, and without a trace."""

from dataclasses import replace

import pytest
import torch

from pretrain.config.schema import LossConfig
from pretrain.engines.guard import SPIKE_WARMUP, StepGuard
from pretrain.optim.schedules import Schedules
from tests.engines.test_single import build, train_step
from tests.small import random_batch, small_config

BAD = (5, 9)


def poisoned(batch):
    return replace(batch, global_crops=batch.global_crops * torch.nan)


def state(engine) -> dict[str, torch.Tensor]:
    named = {f"{part}/{k}": v for part, tensors in engine.state_dict().items() for k, v in tensors.items()}
    return {key: value.clone() for key, value in named.items() if "guard" not in key}


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_nan_images_equal_steps_that_never_were(centering):
    cfg = small_config(loss=LossConfig(centering=centering))
    (one, first), (two, second) = build(cfg), build(cfg)
    for step in range(20):
        batch = random_batch(cfg, 4, seed=step)
        train_step(one, first, cfg, [poisoned(batch) if step in BAD else batch], step)
        if step not in BAD:
            train_step(two, second, cfg, [batch], step)
    assert one.bad_steps() == (2, 0)
    expected, actual = state(two), state(one)
    assert [key for key, value in expected.items() if not torch.equal(value, actual[key])] == []
    assert all(torch.isfinite(value).all() for value in actual.values())


def test_a_loss_spike_changes_nothing():
    cfg = small_config()
    cfg = replace(cfg, optim=replace(cfg.optim, spike_factor=3.0))
    engine, method = build(cfg)
    for step in range(SPIKE_WARMUP):
        train_step(engine, method, cfg, [random_batch(cfg, 4, seed=step % 5)], step)
    before, batch, values = state(engine), random_batch(cfg, 4), Schedules(cfg).at(9)
    for factor, bad in ((2.0, 0), (5.0, 1)):
        engine.begin_step(9, values)
        targets = method.targets([engine.teacher(batch)], [batch.mask_weights], values.teacher_temp, 9)
        if bad:
            before = state(engine)
        engine.backward(method.losses(engine.student(batch), targets[0], batch).total * factor)
        result = engine.step()
        method.commit(result.good)
        engine.update_teacher(values.momentum)
        assert bool(result.good) is not bool(bad)
        assert engine.bad_steps() == (bad, bad)
    assert all(torch.equal(value, before[key]) for key, value in state(engine).items())


def test_a_spike_is_judged_against_the_good_steps_only():
    guard = StepGuard(spike_factor=2.0)
    one = torch.ones(())
    for _ in range(SPIKE_WARMUP):
        assert guard.check(one, [one])
    assert guard.check(one * 1.9, [one])
    for count in range(1, 4):
        assert not guard.check(one * 100, [one])
        assert guard.bad_run == count
    assert guard.loss_mean < 1.1
    assert guard.check(one, [one])
    assert (guard.bad_steps, guard.bad_run) == (3, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_and_norms_must_be_finite(value):
    guard, one = StepGuard(spike_factor=0.0), torch.ones(())
    assert guard.check(one * 1e30, [one])
    assert not guard.check(one * value, [one])
    assert not guard.check(one, [one, one * value])
