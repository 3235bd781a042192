"""A small training run that the DeepSpeed engine on any number of ranks and the single engine do alike."""

from dataclasses import replace

import torch
import torch.distributed as dist

from pretrain.config.schema import (
    DeepspeedConfig,
    EngineConfig,
    HeadConfig,
    IbotHeadConfig,
    LossConfig,
    RmlpConfig,
)
from pretrain.distributed import all_sum, rank, world_size
from pretrain.engines.deepspeed_start import build_deepspeed
from pretrain.engines.single import SingleEngine
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.models.init import init_weights
from pretrain.optim.schedules import Schedules
from tests.small import random_batch, small_config

PARTS, IMAGES = 4, 4  # micro-batches per step over all ranks, images in each
STEPS = 4
BAD_STEP = 2
CPU = torch.device("cpu")


def plain_config(**more):
    """Two MLP heads, drop path, Sinkhorn over all ranks, gradients clipped at every step."""
    cfg = small_config(
        ibot_head=IbotHeadConfig(shared=False, prototypes=30, hidden_dim=32, bottleneck_dim=16),
        loss=LossConfig(centering="sinkhorn"),
        **more,
    )
    optim = replace(cfg.optim, global_batch_size=PARTS * IMAGES, clip_grad_norm=0.2)
    return replace(cfg, model=replace(cfg.model, drop_path_rate=0.3), optim=optim)


def rmlp_config():
    """An MLP head beside a frozen backbone, which a randomized one replaces at step 2; softmax centres."""
    head = HeadConfig(kind="rmlp", prototypes=40, hidden_dim=32, bottleneck_dim=16)
    cfg = small_config(dino_head=head, rmlp=RmlpConfig(outputs=64, start_step=2))
    optim = replace(cfg.optim, global_batch_size=PARTS * IMAGES, freeze_backbone_steps=2)
    return replace(cfg, optim=optim)


def on_deepspeed(cfg, stage, **more):
    parts = PARTS // world_size()
    engine = EngineConfig("deepspeed", "cpu", cfg.engine.precision, parts, DeepspeedConfig(stage, **more))
    return replace(cfg, engine=engine)


def build(cfg):
    """Engine and method of a config, from the same weights everywhere."""
    student, teacher = SSLBranch(cfg, "student"), SSLBranch(cfg, "teacher")
    init_weights(student, seed=0)
    teacher.load_state_dict(student.state_dict())
    method = DinoV2(cfg)
    make = build_deepspeed if cfg.engine.kind == "deepspeed" else SingleEngine
    return make(student, teacher, method, cfg.optim, cfg.engine, CPU), method


def micro_batches(cfg, step):
    """This rank's share of a step's micro-batches."""
    return [random_batch(cfg, IMAGES, seed=step * PARTS + i) for i in range(rank(), PARTS, world_size())]


def train_step(engine, method, cfg, step, poison=False):
    """Loss over all ranks, gradient norms and layer norms of one step; `poison` spoils one rank's images."""
    values, batches = Schedules(cfg).at(step), micro_batches(cfg, step)
    if poison and rank() == world_size() - 1:
        batches[-1] = replace(batches[-1], global_crops=batches[-1].global_crops * torch.nan)
    engine.begin_step(step, values)
    outputs = [engine.teacher(batch) for batch in batches]
    targets = method.targets(outputs, [b.mask_weights for b in batches], values.teacher_temp, step)
    total = torch.zeros(())
    for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        terms = method.losses(engine.student(batch), target, batch)
        engine.backward(terms.total / len(batches), last=i == len(batches) - 1)
        total += terms.total.detach() / len(batches)
    layers = {k: v.item() for k, v in engine.layer_norms().items()}
    result = engine.step()
    method.commit(result.good)
    engine.update_teacher(values.momentum)
    norms = {k: v.item() for k, v in result.grad_norms.items()}
    loss = (all_sum(total) / world_size()).item()
    return {"loss": loss, "norms": norms, "layers": layers, "good": bool(result.good)}


def run(cfg, steps=range(STEPS), bad=None, built=None):
    """Steps of a fresh engine (or the given one) and the weights after them."""
    engine, method = built or build(cfg)
    reports = [train_step(engine, method, cfg, step, step == bad) for step in steps]
    weights = {k: v.clone() for k, v in engine.state_dict()["model"].items()}
    return {"steps": reports, "weights": weights, "bad_steps": engine.bad_steps()}, (engine, method)


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0
