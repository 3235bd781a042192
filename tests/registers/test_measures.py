"""Figures against counting by hand, and their ends."""

import math

import pytest
import torch

from pretrain.analysis.maps import cls_attention
from pretrain.analysis.taps import Place, tapped
from pretrain.registers.attention import attention_rows, jensen_shannon
from pretrain.registers.conditions import parse_condition
from pretrain.registers.interventions import Intervention
from pretrain.registers.looks import FULL, look
from pretrain.registers.measures import Oddness, effective_rank, patch_cosines

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def looked(backbone, batch, calibration):
    names = ("registers:zero", "registers:bank", "patch:4:mean", "cls:zero")
    doing = {name: Intervention(parse_condition(name), range(3), calibration) for name in names}
    return look(backbone, [batch], doing, calibration, 4)


def test_divergence_lies_between_nothing_and_ln_2():
    p, q = torch.softmax(5 * torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = jensen_shannon(p, q)
    middle = (p + q) / 2
    by_hand = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2
    torch.testing.assert_close(found, by_hand, **CLOSE)
    assert (found > 0).all() and (found < math.log(2)).all()
    assert jensen_shannon(p, p).abs().max() == 0
    apart = jensen_shannon(torch.tensor([1.0, 0, 0]), torch.tensor([0, 0.5, 0.5]))
    assert apart == pytest.approx(math.log(2))


def test_attention_rows_are_what_the_model_attends_to(backbone, batch):
    seen = {}
    with tapped(backbone, 6, {Place(2, "LN1"): lambda t: seen.update(tokens=t)}), torch.no_grad():
        backbone([batch.pixels])
    rows = attention_rows(backbone.blocks[2].attn, seen["tokens"])
    assert rows.shape == (6, 4, 21, 21)
    torch.testing.assert_close(rows.sum(-1), torch.ones(6, 4, 21))
    torch.testing.assert_close(
        rows[:, :, 0, 5:].unflatten(-1, (4, 4)), cls_attention(backbone, batch.pixels), **CLOSE
    )


def test_attention_moves_after_the_first_block_only(looked, backbone, batch):
    for name, seen in looked.seen.items():
        if name == FULL:
            continue
        found = seen.attention.means()
        first, *others = found["divergence"]
        assert first == 0 and all(0 < value < math.log(2) for value in others)
        assert found["cls_full"][0] == found["cls_ablated"][0]
        assert found["cls_full"][1:] != found["cls_ablated"][1:]
    patches = cls_attention(backbone, batch.pixels[:4]).sum(dim=(2, 3)).mean()
    on = {
        name: looked.seen[name].attention.means()["cls_full"][-1] for name in ("registers:zero", "cls:zero")
    }
    assert sum(on.values()) + float(patches) == pytest.approx(1, abs=1e-5)


def test_attention_on_a_set_is_that_of_the_rows(looked, backbone, batch):
    inputs = backbone.blocks[0].norm1(backbone.embed(batch.pixels[:4]))
    rows = attention_rows(backbone.blocks[0].attn, inputs).mean(dim=(0, 1))  # (T, T)
    found = looked.seen["registers:zero"].attention.means()
    assert found["cls_full"][0] == pytest.approx(float(rows[0, 1:5].sum()), abs=1e-6)
    assert found["patch_full"][0] == pytest.approx(float(rows[5:, 1:5].sum(-1).mean()), abs=1e-6)


def test_attention_is_compared_on_as_many_images_as_asked(backbone, batch, calibration, looked):
    doing = {"cls:zero": Intervention(parse_condition("cls:zero"), range(3), calibration)}
    none = look(backbone, [batch], doing, calibration, 0)
    assert none.seen["cls:zero"].attention.images == 0 and looked.seen["cls:zero"].attention.images == 4
    assert torch.equal(none.seen["cls:zero"].cls[0], looked.seen["cls:zero"].cls[0])


def test_a_look_without_measures_pools_the_same(looked, backbone, batch, calibration):
    doing = {"cls:zero": Intervention(parse_condition("cls:zero"), range(3), calibration)}
    plain = look(backbone, [batch], doing, calibration, 4, measured=False)
    for name in (FULL, "cls:zero"):
        for kind, values in plain.seen[name].pooled().items():
            assert torch.equal(values, looked.seen[name].pooled()[kind])
    assert plain.labels == looked.labels == batch.labels and not plain.ranks


def test_a_look_keeps_the_pooled_features_of_each_condition(looked, backbone, batch):
    full = backbone([batch.pixels])[0]
    pooled = looked.seen[FULL].pooled()
    assert torch.equal(pooled["cls"], full.cls)
    assert torch.equal(pooled["patch_mean"], full.patches.mean(1))
    zero = looked.seen["cls:zero"].pooled()["cls"]
    torch.testing.assert_close(zero, backbone.norm.bias.expand(6, -1))  # zeros, after the final norm
    for seen in looked.seen.values():  # and no more: a view would keep all tokens of all batches
        assert all(kept.untyped_storage().nbytes() == 4 * kept.numel() for kept in seen.cls)


def test_cosines_leave_out_replaced_patches(looked):
    full = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    ablated = full.clone()
    ablated[0, 1], ablated[1, 3] = -full[0, 1], 0
    assert patch_cosines(full, ablated, torch.tensor([[3], [5]]), 2).min() == pytest.approx(1)
    assert patch_cosines(full, ablated, torch.tensor([[0], [1]]), 2).min() == pytest.approx(-1)
    assert len(looked.seen["patch:4:mean"].cosines[0]) == 6 * 12
    assert len(looked.seen["cls:zero"].cosines[0]) == 6 * 16


def test_effective_rank_counts_directions():
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    tokens = torch.stack([basis[torch.arange(12) % directions] * 3 for directions in (1, 3, 6)])
    torch.testing.assert_close(effective_rank(tokens), torch.tensor([1.0, 3.0, 6.0]), **CLOSE)
    gram = torch.nn.functional.normalize(torch.randn(1, 5, 8), dim=-1)
    values = torch.linalg.eigvalsh(gram[0] @ gram[0].T)
    shares = values / values.sum()
    by_hand = (-(shares * shares.log()).sum()).exp()
    torch.testing.assert_close(effective_rank(gram)[0], by_hand, atol=1e-4, rtol=1e-4)


def test_tokens_like_the_calibrations_are_not_odd(calibration):
    def oddness(values):
        found = Oddness(calibration)
        found.add(1, torch.tensor([[1, 2]]).expand(len(values), -1), values)
        return {name: figure[0] for name, figure in found.means().items()}

    own = calibration.bank[:, 1, 1:3]
    mean = calibration.mean[1, 1:3].expand_as(own)
    assert oddness(own)["distance"] == pytest.approx(1, abs=0.1) and abs(oddness(own)["log_norm"]) < 0.1
    assert oddness(mean)["distance"] == 0
    assert oddness(torch.zeros_like(own))["log_norm"] == -math.inf
    far = mean + 7 * calibration.var[1, 1:3].sqrt()
    assert oddness(far)["distance"] == pytest.approx(7, rel=1e-3)
    assert oddness(2 * own)["log_norm"] == pytest.approx(oddness(own)["log_norm"] + math.log(2), abs=1e-5)
