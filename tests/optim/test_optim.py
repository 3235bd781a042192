"""Schedules and parameter groups of DINOv2's recipes."""

from dataclasses import replace

import pytest
import torch

from pretrain.config.derived import peak_lr
from pretrain.config.schema import Config, OptimConfig
from pretrain.method.branch import SSLBranch
from pretrain.optim.groups import group_key, parameter_groups, set_step_values
from pretrain.optim.schedules import Schedules
from tests.small import small_config

SHORT = replace(Config(), optim=replace(OptimConfig(), lr_scaling="none"))


@pytest.mark.parametrize(
    ("step", "lr"), [(0, 0.0), (1, 3.2003e-7), (12_499, 0.004), (12_500, 0.004), (124_999, 1.0000008e-6)]
)
def test_learning_rate_of_the_short_recipe(step, lr):
    assert Schedules(SHORT).at(step).lr == pytest.approx(lr, rel=1e-4)


def test_other_schedules_of_the_short_recipe():
    schedules = Schedules(SHORT)
    first, middle, last = (schedules.at(step) for step in (0, 62_500, 124_999))
    assert [first.weight_decay, middle.weight_decay] == pytest.approx([0.04, 0.22])
    assert [first.momentum, middle.momentum, last.momentum] == pytest.approx([0.992, 0.996, 1.0])
    assert [first.teacher_temp, last.teacher_temp] == pytest.approx([0.04, 0.07])
    assert schedules.at(37_499).teacher_temp == pytest.approx(0.07)
    assert schedules.at(1_249).last_layer_lr == 0.0
    assert schedules.at(1_250).last_layer_lr == schedules.at(1_250).lr > 0


def test_the_backbone_is_frozen_at_first():
    cfg = replace(SHORT, optim=replace(SHORT.optim, freeze_backbone_steps=5))
    before, after = (Schedules(cfg).at(step) for step in (4, 5))
    assert before.backbone_lr == 0.0 < before.lr
    assert after.backbone_lr == after.lr


@pytest.mark.parametrize(("batch", "lr", "peak"), [(2048, 0.004, 5.657e-3), (3072, 2e-4, 3.464e-4)])
def test_peak_learning_rate_scales_with_the_root_of_the_batch(batch, lr, peak):
    assert peak_lr(OptimConfig(global_batch_size=batch, lr=lr)) == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "lr_mult", "wd_mult"),
    [
        ("backbone.cls_token", 0.9**4, 1.0),
        ("backbone.pos_embed", 0.9**4, 1.0),
        ("backbone.register_tokens", 0.9**4, 1.0),
        ("backbone.mask_token", 0.9**4, 1.0),
        ("backbone.patch_embed.proj.weight", 0.9**4 * 0.2, 1.0),
        ("backbone.patch_embed.proj.bias", 0.9**4 * 0.2, 0.0),
        ("backbone.blocks.0.attn.qkv.weight", 0.9**3, 1.0),
        ("backbone.blocks.2.norm1.weight", 0.9, 0.0),
        ("backbone.blocks.2.ls1.gamma", 0.9, 0.0),
        ("backbone.norm.weight", 1.0, 0.0),
        ("dino_head.mlp.0.weight", 1.0, 1.0),
        ("dino_head.mlp.0.bias", 1.0, 0.0),
    ],
)
def test_group_of_a_parameter(name, lr_mult, wd_mult):
    key = group_key(name, 3, OptimConfig())
    assert (key.lr_mult, key.wd_mult, key.is_last_layer) == (pytest.approx(lr_mult), wd_mult, False)
    assert key.is_backbone == name.startswith("backbone.")


def test_prototypes_are_frozen_at_first_and_every_parameter_has_one_group():
    cfg = small_config()
    student = SSLBranch(cfg, "student")
    groups = parameter_groups(student.named_parameters(), 2, cfg.optim)
    assert sorted(n for g in groups for n in g["names"]) == sorted(n for n, _ in student.named_parameters())
    for step, frozen in ((0, True), (1, False)):
        values = Schedules(cfg).at(step)
        set_step_values(groups, replace(values, lr=0.5, last_layer_lr=0.0 if frozen else 0.5))
        rates = {name: g["lr"] for g in groups for name in g["names"]}
        assert rates["dino_head.last_layer.weight_v"] == (0.0 if frozen else 0.5)
        assert rates["dino_head.mlp.0.weight"] == 0.5
    set_step_values(groups, replace(values, lr=0.5, last_layer_lr=0.5, backbone_lr=0.0))
    rates = {name: g["lr"] for g in groups for name in g["names"]}
    assert {name for name, rate in rates.items() if rate == 0} == {n for n in rates if n[:8] == "backbone"}
    decays = {name: g["weight_decay"] for g in groups for name in g["names"]}
    assert decays["dino_head.last_layer.weight_g"] == pytest.approx(values.weight_decay)
    assert decays["backbone.norm.bias"] == 0.0
    assert all(isinstance(p, torch.nn.Parameter) for g in groups for p in g["params"])
