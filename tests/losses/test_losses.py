"""Losses and targets against naive loops."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.config.schema import RmlpConfig
from pretrain.heads import RmlpHead
from pretrain.losses.centering import SoftmaxCenter, Target
from pretrain.losses.cross_entropy import TargetRows, cross_entropy
from pretrain.losses.dino import dino_losses, dino_targets
from pretrain.losses.ibot import ibot_loss
from pretrain.losses.koleo import koleo_loss
from pretrain.losses.sinkhorn import sinkhorn_targets
from pretrain.projection import Projection

GOOD = torch.tensor(True)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_cross_entropy(target, logits, temp):
    return -(target * (logits / temp).log_softmax(-1)).sum()


def given(targets):
    return TargetRows(len(targets), lambda block: targets[block])


def row_losses(logits, targets):
    return cross_entropy(Projection(logits, torch.eye(logits.shape[1])), [targets], 0.1)


@pytest.mark.parametrize(("cached", "product"), [(1, 10**6), (200, 300), (10**6, 10**6)])
def test_cross_entropy_and_its_gradients_equal_autograd_s(monkeypatch, cached, product):
    monkeypatch.setattr("pretrain.losses.blocks.CACHED_BYTES", cached)
    monkeypatch.setattr("pretrain.losses.cross_entropy.PRODUCT_BYTES", product)
    targets, outer = random(12, 8, seed=1).softmax(-1) * torch.arange(12).unsqueeze(1), random(12, seed=2)
    factors = random(12, 5).requires_grad_(), random(8, 5, seed=3).requires_grad_()
    logits = factors[0] @ factors[1].t()
    naive = torch.stack([naive_cross_entropy(*pair, 0.1) for pair in zip(targets, logits, strict=True)])
    mine = cross_entropy(Projection(*factors), [given(part) for part in targets.split([5, 0, 7])], 0.1)
    torch.testing.assert_close(mine, naive)
    expected = torch.autograd.grad(naive, factors, outer)
    torch.testing.assert_close(torch.autograd.grad(mine, factors, outer), expected)


def test_drawn_prototypes_get_no_gradient():
    features, prototypes = random(3, 5).requires_grad_(), random(8, 5)
    loss = cross_entropy(Projection(features, prototypes), [given(random(3, 8).softmax(-1))], 0.1)
    loss.sum().backward()
    assert features.grad.any() and prototypes.grad is None


def test_dino_loss_is_the_mean_over_crop_pairs():
    student_global, student_local = random(2, 3, 8), random(4, 3, 8, seed=1)
    targets = random(2, 3, 8, seed=2).softmax(-1)
    pairs_global, pairs_local = [], []
    for t in range(2):
        pairs_global += [naive_cross_entropy(targets[t, b], student_global[1 - t, b], 0.1) for b in range(3)]
        pairs_local += [
            naive_cross_entropy(targets[t, b], student_local[crop, b], 0.1)
            for crop in range(4)
            for b in range(3)
        ]
    num_pairs = len(pairs_global) + len(pairs_local)
    rows = torch.cat([student_global, student_local]).flatten(0, 1)
    terms = row_losses(rows, dino_targets(targets, 4))
    global_term, local_term = dino_losses(terms, 3)
    torch.testing.assert_close(global_term, sum(pairs_global) / num_pairs)
    torch.testing.assert_close(local_term, sum(pairs_local) / num_pairs)


def test_ibot_loss_weighs_images_equally_and_counts_unmasked_ones():
    student, targets = random(5, 8), random(5, 8, seed=1).softmax(-1)
    owner = [0, 0, 0, 2, 2]  # crops 1 and 3 have no mask
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2])
    per_crop = [
        sum(naive_cross_entropy(targets[j], student[j], 0.1) for j in range(5) if owner[j] == crop)
        / owner.count(crop)
        for crop in (0, 2)
    ]
    terms = row_losses(student, given(targets))
    torch.testing.assert_close(ibot_loss(terms, weights, 4), sum(per_crop) / 4)


def test_ibot_loss_ignores_padding():
    terms, weights = random(5), torch.full((5,), 0.2)
    padded = torch.cat([terms, random(2, seed=1)]), torch.cat([weights, torch.zeros(2)])
    torch.testing.assert_close(ibot_loss(*padded, 4), ibot_loss(terms, weights, 4))


def test_koleo_against_a_loop_in_each_group():
    features = random(2, 3, 5, 8)
    expected = torch.zeros(2, 3)
    for crop in range(2):
        for group in range(3):
            x = torch.nn.functional.normalize(features[crop, group], dim=-1)
            for i in range(5):
                distances = [(x[i] - x[j] + 1e-8).norm() for j in range(5) if j != i]
                expected[crop, group] -= (min(distances) + 1e-8).log() / 5
    torch.testing.assert_close(koleo_loss(features), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_koleo_stays_finite_for_duplicates_and_single_images(dtype):
    duplicates = torch.ones(4, 8, dtype=dtype, requires_grad=True)
    loss = koleo_loss(duplicates)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(duplicates.grad).all()
    assert koleo_loss(torch.ones(3, 1, 8, dtype=dtype)).tolist() == [0, 0, 0]


def projections(rows, prototypes=12, seed=0, scale=1.0):
    return Projection(random(rows, 6, seed=seed) * scale, random(prototypes, 6, seed=seed + 1))


def offset_of(*args, **options):
    return sinkhorn_targets(*args, **options)[0].offset


def naive_sinkhorn(logits, temp, iterations):
    """DINOv2's three lines, in float64."""
    q = (logits.double() / temp).exp().t()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).t()


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_the_textbook_in_float64(iterations):
    projection = projections(20)
    offset = offset_of([projection], [torch.ones(20)], 0.5, iterations)
    expected = naive_sinkhorn(projection.logits(), 0.5, iterations)
    torch.testing.assert_close(
        Target(projection, offset, 0.5).probabilities().double(), expected, rtol=1e-5, atol=1e-7
    )


def test_sinkhorn_over_micro_batches_equals_sinkhorn_over_all():
    whole = projections(20)
    parts = whole.split([6, 9, 5])
    one = offset_of([whole], [torch.ones(20)], 0.3, 3)
    many = offset_of(parts, [torch.ones(6), torch.ones(9), torch.ones(5)], 0.3, 3)
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [None, 7])
def test_sinkhorn_equals_itself_with_nothing_held(monkeypatch, outputs):
    parts, weights = projections(20).split([6, 14]), [torch.ones(6), torch.tensor([0.5] * 11 + [0.0] * 3)]
    held = sinkhorn_targets(parts, weights, 0.3, 3, outputs)
    monkeypatch.setattr("pretrain.losses.blocks.CACHED_BYTES", 100)
    monkeypatch.setattr("pretrain.losses.sinkhorn.PRODUCT_BYTES", 200)
    computed = sinkhorn_targets(parts, weights, 0.3, 3, outputs, held_bytes=0)
    for one, two in zip(held, computed, strict=True):
        assert one.held is not None and two.held is None
        expected = one.let_go().probabilities()
        torch.testing.assert_close(one.held, expected)
        torch.testing.assert_close(two.probabilities(), expected)
        torch.testing.assert_close(one.rows().rows(slice(2, 4)), two.rows().rows(slice(2, 4)))


def test_padding_enters_neither_sinkhorn_nor_the_centre():
    whole, weights = projections(20), torch.tensor([0.5] * 15 + [0.0] * 5)
    valid = whole.split([15, 5])[0]
    padded = offset_of([whole], [weights], 0.3, 3)
    torch.testing.assert_close(padded, offset_of([valid], [torch.ones(15)], 0.3, 3))
    one, two = SoftmaxCenter(12, 0.9), SoftmaxCenter(12, 0.9)
    one.offset([whole], [weights], 0.1)
    two.offset([valid], [torch.ones(15)], 0.1)
    one.commit(GOOD)
    two.commit(GOOD)
    torch.testing.assert_close(one.center, two.center)


def test_sinkhorn_is_finite_on_randomized_heads():
    """exp(logits / 0.04) overflows there, and one subtracted maximum leaves rows of zeros."""
    head = RmlpHead(384, RmlpConfig(outputs=4096), 0, "dino", "teacher")
    head.begin_step(0)
    projection = head(torch.nn.functional.layer_norm(random(64, 384), (384,)))
    assert not torch.isfinite((projection.logits() / 0.04).exp()).all()
    offset = offset_of([projection], [torch.ones(64)], 0.04, 3)
    probabilities = Target(projection, offset, 0.04).probabilities()
    assert torch.isfinite(probabilities).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(64))
    first = probabilities[:, :256].sum() / 64
    assert first < 0.5  # the mass goes to outputs that are noise, unless they are left out:
    offset = offset_of([projection], [torch.ones(64)], 0.04, 3, outputs=256)
    probabilities = Target(projection, offset, 0.04).probabilities()
    assert not probabilities[:, 256:].any()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(64))
    alone = projection.first(256)
    part = Target(alone, offset_of([alone], [torch.ones(64)], 0.04, 3), 0.04)
    torch.testing.assert_close(probabilities[:, :256], part.probabilities())


def test_sinkhorn_without_a_valid_row_has_no_offset():
    assert offset_of([projections(3)], [torch.zeros(3)], 0.3, 3).tolist() == [0.0] * 12


def test_centre_follows_the_mean_and_acts_on_the_next_step():
    projection, center = projections(20), SoftmaxCenter(12, 0.9)
    first = center.offset([projection], [torch.ones(20)], 0.05)
    assert not first.any()
    center.commit(GOOD)
    mean = projection.logits().mean(0)
    second = center.offset([projection], [torch.ones(20)], 0.05)
    center.commit(GOOD)
    torch.testing.assert_close(second, -0.1 * mean / 0.05)
    torch.testing.assert_close(center.center, (0.9 * 0.1 + 0.1) * mean)


def test_a_bad_step_leaves_the_centre():
    projection, center = projections(20), SoftmaxCenter(12, 0.9)
    center.offset([projection], [torch.ones(20)], 0.05)
    center.commit(GOOD)
    before = center.center.clone()
    center.offset(
        [Projection(projection.features * torch.nan, projection.prototypes)], [torch.ones(20)], 0.05
    )
    center.commit(~GOOD)
    assert torch.equal(center.center, before)


def _rank(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part = projections(20).split([13, 7])[rank]
    weights = [torch.ones(len(part.features))]
    center = SoftmaxCenter(12, 0.9)
    center.offset([part], weights, 0.3)
    center.commit(GOOD)
    results[rank] = offset_of([part], weights, 0.3, 3).tolist(), center.center.tolist()
    dist.destroy_process_group()


def test_two_ranks_with_unequal_rows_equal_one(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (str(tmp_path / "store"), results), nprocs=2)
        ranks = dict(results)
    whole, center = projections(20), SoftmaxCenter(12, 0.9)
    center.offset([whole], [torch.ones(20)], 0.3)
    center.commit(GOOD)
    offset = offset_of([whole], [torch.ones(20)], 0.3, 3)
    for rank in (0, 1):
        torch.testing.assert_close(torch.tensor(ranks[rank][0]), offset, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(ranks[rank][1]), center.center)
