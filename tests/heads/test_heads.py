"""Projection heads: the trainable one, and the properties that define the randomized one."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity, gelu, pad

from pretrain.config.derived import rmlp_widths
from pretrain.config.schema import HeadConfig, RmlpConfig
from pretrain.errors import InputError
from pretrain.heads import MlpHead, RmlpHead
from pretrain.heads.rmlp import check_memory
from pretrain.models.init import init_weights

DIM = 24
CFG = RmlpConfig(outputs=64)


def rmlp(cfg=CFG, loss="dino", branch="student", step=0, dim=DIM, seed=0) -> RmlpHead:
    head = RmlpHead(dim, cfg, seed, loss, branch)
    head.begin_step(step)
    return head


def tokens(rows=10, dim=DIM):
    return torch.nn.functional.layer_norm(
        torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)), (dim,)
    )


def test_a_normed_last_layer_has_no_lengths_to_train():
    trained, normed = (
        MlpHead(DIM, HeadConfig(prototypes=30, hidden_dim=16, bottleneck_dim=8, norm_last_layer=norm))
        for norm in (False, True)
    )
    for head in (trained, normed):
        init_weights(head, seed=0)
    assert trained.state_dict().keys() - normed.state_dict().keys() == {"last_layer.weight_g"}
    expected = trained(tokens()).logits()
    assert torch.equal(normed(tokens()).logits(), expected)
    torch.testing.assert_close(normed.last_layer().norm(dim=1), torch.ones(30))
    with torch.no_grad():
        normed.last_layer.weight_v.mul_(3)
    torch.testing.assert_close(normed(tokens()).logits(), expected)


def test_mlp_head_is_cosine_similarity_times_the_prototypes_length():
    head = MlpHead(DIM, HeadConfig(prototypes=30, hidden_dim=16, bottleneck_dim=8))
    init_weights(head, seed=0)
    with torch.no_grad():
        head.last_layer.weight_g.copy_(torch.linspace(0.5, 2, 30).unsqueeze(1))
    x = tokens()
    logits = head(x).logits()
    directions, bottleneck = head.last_layer.weight_v, head.mlp(x)
    for row in range(10):
        expected = cosine_similarity(bottleneck[row], directions, dim=-1) * head.last_layer.weight_g.squeeze(
            1
        )
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-6)


def test_weighted_sum_of_the_logits_needs_no_logits():
    projection = rmlp()(tokens())
    total, count = projection.weighted_sum(torch.tensor([1.0] * 7 + [0.0] * 3))
    torch.testing.assert_close(total, projection.logits()[:7].sum(0))
    assert count.item() == 7


def test_rmlp_has_no_parameters_and_no_state_but_passes_gradients():
    head, x = rmlp(), tokens().requires_grad_()
    head(x).logits().square().sum().backward()
    assert list(head.parameters()) == []
    assert head.state_dict() == {}
    assert x.grad.abs().min() > 0


def test_rmlp_draws_depend_on_step_loss_and_branch():
    x = tokens()
    reference = rmlp()(x).logits()
    assert torch.equal(reference, rmlp()(x).logits())
    for other in (rmlp(step=1), rmlp(loss="ibot"), rmlp(branch="teacher"), rmlp(seed=1)):
        assert not torch.allclose(reference, other(x).logits())


def test_rmlp_shares_draws_on_request():
    x = tokens()
    branches = replace(CFG, share_student_teacher=True)
    assert torch.equal(rmlp(branches)(x).logits(), rmlp(branches, branch="teacher")(x).logits())
    assert not torch.equal(rmlp(branches)(x).logits(), rmlp(branches, loss="ibot")(x).logits())
    losses = replace(CFG, share_dino_ibot=True)
    assert torch.equal(rmlp(losses)(x).logits(), rmlp(losses, loss="ibot")(x).logits())


def test_rmlp_draws_anew_as_often_as_asked():
    x = tokens()
    frozen, third = replace(CFG, resample_every=0), replace(CFG, resample_every=3)
    assert torch.equal(rmlp(frozen, step=0)(x).logits(), rmlp(frozen, step=999)(x).logits())
    logits = [rmlp(third, step=step)(x).logits() for step in range(4)]
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[2], logits[3])


def test_rmlp_continued_equals_rmlp_resumed():
    head = rmlp(step=0)
    for step in range(1, 6):
        head.begin_step(step)
    assert torch.equal(head(tokens()).logits(), rmlp(step=5)(tokens()).logits())


def test_rmlp_without_noise_is_gelu_of_the_first_coordinates():
    x = tokens()
    logits = rmlp(replace(CFG, amplitude=0.0))(x).logits()
    kept = rmlp_widths(DIM, 64)[3]
    expected = pad(gelu(gelu(gelu(x)))[:, :kept], (0, 64 - kept))
    torch.testing.assert_close(logits, expected)


def test_rmlp_logits_of_two_draws_agree_as_measured():
    """At ViT-S width and amplitude 5, two independent draws' logits have a cosine of 0.918."""
    x, cfg = tokens(256, 384), RmlpConfig(outputs=4096)
    one, two = (rmlp(cfg, step=step, dim=384)(x).logits() for step in (0, 1))
    assert cosine_similarity(one, two, dim=1).mean().item() == pytest.approx(0.918, abs=0.02)


def test_rmlp_before_its_first_draw_is_an_error():
    with pytest.raises(RuntimeError, match="begin_step"):
        RmlpHead(DIM, CFG, 0, "dino", "student")(tokens())


def test_a_head_that_cannot_fit_is_refused_with_its_sizes():
    with pytest.raises(
        InputError, match=r"rmlp.outputs=1,048,576: the draws of a step take 16\.8 GiB, .* 2D//3 = 1,024"
    ):
        check_memory(1536, 1_048_576, rows=640, free=24 * 2**30 // 2)
    check_memory(1536, 4096, rows=640, free=24 * 2**30 // 2)
