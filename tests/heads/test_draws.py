"""What randomized heads draw: distributions, kept buffers, and what is left to learn from two draws."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm

from pretrain.config.schema import RmlpConfig
from pretrain.heads import RmlpHead
from pretrain.heads.draws import fill_noise, layer_weight
from pretrain.seeding import torch_stream

INITS = ("gaussian", "orthogonal", "rademacher", "sparse")


def noise(init: str, n: int, m: int, number: int = 0) -> torch.Tensor:
    return fill_noise(torch.empty(n, m), init, torch_stream(0, "test", number))


def head(cfg: RmlpConfig, branch: str = "student", dim: int = 24) -> RmlpHead:
    return RmlpHead(dim, cfg, 0, "dino", branch)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape", [(200, 100), (100, 200), (150, 150)])
def test_entries_have_mean_0_and_variance_1(init, shape):
    g = noise(init, *shape)
    error = 3 / g.numel() ** 0.5
    assert g.mean().abs() < error
    assert (g.square().mean() - 1).abs() < 1.5 * error  # sparse has a variance of squares of 2, as gaussian
    assert not torch.equal(g, noise(init, *shape, number=1))


def test_each_kind_is_what_its_name_says():
    assert noise("rademacher", 50, 40).unique().tolist() == [-1, 1]
    sparse = noise("sparse", 300, 200)
    assert sparse.unique().square().tolist() == pytest.approx([3, 0, 3])
    assert (sparse != 0).float().mean().item() == pytest.approx(1 / 3, abs=0.01)
    for n, m in ((30, 70), (70, 30)):
        g = noise("orthogonal", n, m)
        products = g @ g.t() if n < m else g.t() @ g
        torch.testing.assert_close(products, 70 * torch.eye(30), atol=1e-3, rtol=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("n", "m"), [(12, 40), (40, 12)])
def test_a_layer_keeps_inner_products_in_expectation(init, n, m):
    """E[<x W, y W>] = <x I, y I> + (a^2 / m) <x, y>; where n <= m that is (1 + a^2 / m) <x, y>."""
    a, draws = 5.0, 2000
    x, y = torch.randn(2, n, generator=torch.Generator().manual_seed(1))
    weights = [layer_weight(noise(init, n, m, i), a, identity=True) for i in range(draws)]
    found = torch.stack([(x @ w) @ (y @ w) for w in weights])
    kept = min(n, m)
    expected = x[:kept] @ y[:kept] + a**2 / m * (x @ y)
    assert (found.mean() - expected).abs() < 3 * found.std() / draws**0.5
    assert (found.mean() - x[:kept] @ y[:kept]).abs() > 10 * found.std() / draws**0.5


def test_gaussian_weights_are_the_streams_normal_numbers():
    cfg = RmlpConfig(outputs=65)
    one = head(cfg)
    one.begin_step(3)
    for index, weight in enumerate(one.weights):
        stream = torch_stream(0, "rmlp", "dino", "student", index, 3)
        normal = torch.randn(weight.shape, generator=stream)
        expected = torch.eye(*weight.shape) + normal * (5.0 / weight.shape[1])
        assert torch.equal(weight, expected)


def test_every_draw_fills_the_same_memory():
    one, x = head(RmlpConfig(outputs=64)), torch.randn(5, 24)
    places = []
    for step in range(3):
        one.begin_step(step)
        with torch.autocast("cpu", torch.bfloat16):
            one(x)
        places.append([w.data_ptr() for w in [*one.weights, *one.layers.lowered]])
    assert places[0] == places[1] == places[2]
    assert len(set(places[0])) == 8


def test_half_precision_rounds_the_weights_of_every_draw():
    one, x = head(RmlpConfig(outputs=64)), torch.randn(5, 24)
    for step in range(2):
        one.begin_step(step)
        with torch.autocast("cpu", torch.bfloat16):
            features, prototypes = one(x)
        assert features.dtype == prototypes.dtype == torch.bfloat16
        assert torch.equal(prototypes, one.weights[-1].t().bfloat16())


def test_another_amplitude_is_another_draw():
    one = head(RmlpConfig(outputs=64, resample_every=0))
    one.begin_step(0, 2.0)
    first = one.weights[0].clone()
    one.begin_step(1, 4.0)
    identity = torch.eye(*first.shape)
    torch.testing.assert_close(one.weights[0] - identity, 2 * (first - identity), atol=1e-6, rtol=0)


def test_heads_of_one_stream_can_keep_one_draw():
    cfg = RmlpConfig(outputs=64, share_student_teacher=True)
    alone, student, teacher = head(cfg, "teacher"), head(cfg), head(cfg, "teacher")
    teacher.share_draws(student)
    for one in (alone, student, teacher):
        one.begin_step(4)
    assert teacher.weights is student.weights
    assert all(torch.equal(*pair) for pair in zip(alone.weights, teacher.weights, strict=True))
    other = head(replace(cfg, share_student_teacher=False), "teacher")
    other.share_draws(head(replace(cfg, share_student_teacher=False)))
    other.begin_step(4)
    assert not torch.equal(other.weights[0], student.weights[0])


def matched_gap(cfg: RmlpConfig, dim: int = 192, rows: int = 48, draws: int = 4) -> float:
    """(loss of matching views - loss of views of other images) / the latter; 0 when there is no signal."""
    generator, gaps = torch.Generator().manual_seed(0), []
    images = torch.randn(rows, dim, generator=generator)
    view = images + 0.5 * torch.randn(rows, dim, generator=generator)
    for step in range(draws):
        student, teacher = head(cfg, "student", dim), head(cfg, "teacher", dim)
        student.begin_step(step)
        teacher.begin_step(step)
        logits = teacher(layer_norm(images, (dim,))).logits()
        targets = torch.softmax((logits - logits.mean(0)) / 0.04, dim=1)
        mine = student(layer_norm(view, (dim,))).logits()
        matched, shuffled = (cross_entropy(mine / 0.1, targets.roll(by, 0)) for by in (0, 1))
        gaps.append((matched - shuffled) / shuffled)
    return torch.stack(gaps).mean().item()


@pytest.mark.parametrize("init", INITS)
def test_without_the_identity_only_a_shared_draw_has_a_signal(init):
    """The config refuses the independent draws: tests/config/test_checks.py."""
    pure = RmlpConfig(outputs=1024, amplitude=100.0, identity=False, init=init)
    assert matched_gap(replace(pure, share_student_teacher=True)) < -0.3
    assert abs(matched_gap(pure, draws=12)) < 0.05


def test_the_identity_makes_independent_draws_agree_while_the_amplitude_is_small():
    assert matched_gap(RmlpConfig(outputs=1024)) < -0.3
    assert abs(matched_gap(RmlpConfig(outputs=1024, amplitude=100.0), draws=12)) < 0.05
