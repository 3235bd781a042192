"""SwAV: losses against plain loops, codes against Sinkhorn-Knopp in float64, the queue through the steps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pretrain.config.schema import Config, LossConfig, MaskConfig, MethodConfig, RmlpConfig, TeacherConfig
from pretrain.engines.single import SingleEngine
from pretrain.method.branch import SSLBranch
from pretrain.method.build import build_method
from pretrain.method.outputs import BranchOutput
from pretrain.method.swav import Swav
from pretrain.models.init import init_weights
from pretrain.optim.schedules import Schedules
from pretrain.projection import Projection
from tests.small import random_batch, small_config

B, L, K, DIM = 8, 3, 40, 16  # images, local crops, prototypes, bottleneck
EPSILON, TAU = 0.05, 0.1
GOOD, BAD = torch.tensor(True), torch.tensor(False)


def swav_config(queue: int = 0, queue_start_step: int = 0, **sections) -> Config:
    base = small_config()
    settings = {
        "method": MethodConfig("swav", queue, queue_start_step),
        "dino_head": replace(base.dino_head, prototypes=K, bottleneck_dim=DIM, norm_last_layer=True),
        "loss": LossConfig(centering="sinkhorn", ibot_weight=0.0, koleo_weight=0.0, student_temp=TAU),
        "mask": MaskConfig(probability=0.0),
        "teacher": TeacherConfig(0.0, 0.0, EPSILON, EPSILON, 0),
    }
    return replace(base, **settings | sections)


def output(number: int, seed: int, prototypes: Tensor | None = None) -> BranchOutput:
    """Unit features (number, DIM) and unit prototypes, the same in every output."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(number, DIM, generator=generator), dim=1)
    if prototypes is None:
        raw = torch.randn(K, DIM, generator=torch.Generator().manual_seed(99))
        prototypes = torch.nn.functional.normalize(raw, dim=1)
    empty = Projection(features[:0], prototypes)
    return BranchOutput(features[: 2 * B], Projection(features, prototypes), empty)


def codes_of(scores: Tensor, rounds: int = 3) -> Tensor:
    """Sinkhorn-Knopp as the paper's appendix writes it: (rows, K) scores to (rows, K) codes."""
    plan = (scores.double() / EPSILON).exp().t()
    plan = plan / plan.sum()
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdim=True) / len(plan)
        plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
    return (plan * plan.shape[1]).t()


def codes(method: Swav, outputs: list[BranchOutput], step: int = 0) -> list[Tensor]:
    """Codes (2, B, K) of each micro-batch."""
    targets = method.targets(outputs, [torch.zeros(1)] * len(outputs), EPSILON, step)
    return [target.dino.probabilities().unflatten(0, (2, -1)) for target in targets]


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_codes_are_one_assignment_for_each_global_crop(rounds: int) -> None:
    cfg = swav_config()
    cfg = replace(cfg, loss=replace(cfg.loss, sinkhorn_iterations=rounds))
    teacher = output(2 * B, seed=0)
    (found,) = codes(Swav(cfg), [teacher])
    for crop, scores in enumerate(teacher.dino.logits().split(B)):
        torch.testing.assert_close(found[crop], codes_of(scores, rounds).float(), rtol=1e-4, atol=1e-6)
    assert found.sum(-1).allclose(torch.ones(2, B))
    joint = codes_of(teacher.dino.logits(), rounds).float().unflatten(0, (2, B))
    assert not torch.allclose(found, joint, rtol=1e-2)  # both crops at once would be another assignment


def test_micro_batches_share_an_assignment() -> None:
    whole = output(2 * B, seed=0)
    features = whole.dino.features.unflatten(0, (2, 2, B // 2))  # crop, micro-batch, image
    parts = [
        BranchOutput(whole.cls, Projection(features[:, i].flatten(0, 1), whole.dino.prototypes), whole.ibot)
        for i in range(2)
    ]
    (expected,) = codes(Swav(swav_config()), [whole])
    torch.testing.assert_close(torch.cat(codes(Swav(swav_config()), parts), dim=1), expected)


def swapped_prediction(scores: Tensor, q: Tensor, local: int) -> Tensor:
    """The loss as the released code loops over it: (2 + L, B, K) scores and (2, B, K) codes."""
    total = 0.0
    for crop in range(2):
        of_crop = 0.0
        for other in range(2 + local):
            if other != crop:
                p = (scores[other] / TAU).log_softmax(1)
                of_crop -= (q[crop] * p).sum(1).mean()
        total += of_crop / (1 + local)
    return total / 2


@pytest.mark.parametrize("koleo_weight", [0.0, 0.3])
def test_losses_are_those_of_a_plain_loop(koleo_weight: float) -> None:
    cfg = swav_config()
    cfg = replace(cfg, loss=replace(cfg.loss, dino_weight=2.0, koleo_weight=koleo_weight))
    method, batch = Swav(cfg), random_batch(cfg, B)
    teacher, student = output(2 * B, seed=0), output((2 + L) * B, seed=1)
    student.dino.features.requires_grad_()
    (targets,) = method.targets([teacher], [batch.mask_weights], EPSILON, 0)
    terms = method.losses(student, targets, batch)
    q = torch.stack([codes_of(scores) for scores in teacher.dino.logits().split(B)]).float()
    expected = swapped_prediction(student.dino.logits().unflatten(0, (2 + L, B)), q, L)
    parts = terms.parts
    torch.testing.assert_close(parts["swav_global"] + parts["swav_local"], expected)
    torch.testing.assert_close(terms.total, 2.0 * expected + koleo_weight * parts["koleo"])
    gradients = [
        torch.autograd.grad(loss, student.dino.features, retain_graph=True)[0]
        for loss in (terms.total - koleo_weight * parts["koleo"], 2.0 * expected)
    ]
    torch.testing.assert_close(*gradients)


def test_the_queue_takes_part_and_whole_batches_leave_it() -> None:
    method = Swav(swav_config(queue=2 * B))
    outputs = [output(2 * B, seed) for seed in range(4)]
    for step, teacher in enumerate(outputs):
        (found,) = codes(method, [teacher], step)
        earlier = outputs[max(step - 2, 0) : step]
        for crop in range(2):
            scores = torch.cat([out.dino.logits().split(B)[crop] for out in (teacher, *earlier)])
            torch.testing.assert_close(found[crop], codes_of(scores)[:B].float(), rtol=1e-4, atol=1e-6)
        method.commit(GOOD)
        assert method.queue.filled == min((step + 1) * B, 2 * B)


def test_a_bad_step_leaves_the_queue() -> None:
    method = Swav(swav_config(queue=2 * B))
    codes(method, [output(2 * B, 0)])
    method.commit(GOOD)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    broken = output(2 * B, 1)
    broken.dino.features[0] = torch.nan
    codes(method, [broken])
    method.commit(BAD)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    method.commit(GOOD)  # what the bad step left is gone
    assert torch.equal(method.queue.features, before["queue.features"])


def test_the_queue_waits_for_its_step() -> None:
    late, never = Swav(swav_config(queue=B, queue_start_step=2)), Swav(swav_config())
    for step in range(3):
        teacher = output(2 * B, step)
        with_queue, without = codes(late, [teacher], step)[0], codes(never, [teacher], step)[0]
        assert torch.equal(with_queue, without) == (step < 2)
        late.commit(GOOD)


def test_randomized_heads_get_codes_on_outputs_that_mean_something() -> None:
    cfg = swav_config(rmlp=RmlpConfig(outputs=K, share_dino_ibot=True, amplitude=2.0))
    cfg = replace(cfg, dino_head=replace(cfg.dino_head, kind="rmlp", norm_last_layer=False))
    (found,) = codes(Swav(cfg), [output(2 * B, 0)])
    used = 2 * 24 // 3
    assert not found[..., used:].any()
    scores = output(2 * B, 0).dino.logits()[:B, :used]
    torch.testing.assert_close(found[0, :, :used], codes_of(scores).float(), rtol=1e-4, atol=1e-6)


def engine_of(cfg: Config) -> SingleEngine:
    student, teacher = SSLBranch(cfg, "student"), SSLBranch(cfg, "teacher")
    init_weights(student, seed=0)
    teacher.load_state_dict(student.state_dict())
    method = build_method(cfg)
    return SingleEngine(student, teacher, method, cfg.optim, cfg.engine, torch.device("cpu"))


def step_of(engine: SingleEngine, cfg: Config, step: int, spoil: bool = False) -> None:
    batch, values = random_batch(cfg, B, seed=step), Schedules(cfg).at(step)
    batch.masks[:] = False
    engine.begin_step(step, values)
    outputs, weights = [engine.teacher(batch)], [batch.mask_weights]
    (targets,) = engine.method.targets(outputs, weights, values.teacher_temp, step)
    total = engine.method.losses(engine.student(batch), targets, batch).total
    engine.backward(total * torch.nan if spoil else total)
    engine.method.commit(engine.step().good)
    engine.update_teacher(values.momentum)


def test_the_teacher_is_the_student_to_the_bit() -> None:
    cfg = swav_config(queue=B)
    engine = engine_of(cfg)
    start = {name: p.clone() for name, p in engine.branches["student"].named_parameters()}
    for step in range(3):
        step_of(engine, cfg, step, spoil=step == 1)
        mine, copy = (dict(engine.branches[name].named_parameters()) for name in ("student", "teacher"))
        assert all(torch.equal(value, copy[name]) for name, value in mine.items())
    assert not torch.equal(start["backbone.cls_token"], mine["backbone.cls_token"])
    assert "dino_head.last_layer.weight_g" not in mine


def test_prototypes_are_frozen_at_first_and_have_length_1() -> None:
    cfg = swav_config()
    cfg = replace(cfg, optim=replace(cfg.optim, freeze_last_layer_steps=2, warmup_steps=0))
    engine = engine_of(cfg)
    layer = engine.branches["student"].dino_head.last_layer
    start = layer().detach().clone()
    for step in range(4):
        assert torch.equal(layer(), start) == (step < 3)
        step_of(engine, cfg, step)
    torch.testing.assert_close(layer().norm(dim=1), torch.ones(K))


def test_a_step_learns_nothing_from_patches() -> None:
    cfg = swav_config()
    engine, batch = engine_of(cfg), random_batch(cfg, B)
    engine.begin_step(0, Schedules(cfg).at(0))
    (targets,) = engine.method.targets([engine.teacher(batch)], [batch.mask_weights], EPSILON, 0)
    assert targets.ibot is None and targets.let_go().ibot is None
    seen = engine.student(batch)
    seen.ibot.features.retain_grad()
    engine.backward(engine.method.losses(seen, targets, batch).total)
    gradient = seen.ibot.features.grad
    assert gradient is None or not gradient.any()
