"""What is replaced, where, by what; all else is the model's own forward."""

from dataclasses import replace

import pytest
import torch

from pretrain.analysis.taps import Place, tapped
from pretrain.errors import InputError
from pretrain.registers.calibration import calibrate
from pretrain.registers.conditions import BANK_PATCHES, MODES, fitting, parse_condition, slots
from pretrain.registers.draws import derangement
from pretrain.registers.interventions import Intervention, intervened, parse_blocks
from pretrain.registers.looks import features
from pretrain.registers.samples import Batch, batches
from tests.registers.conftest import MODEL, backbone_of

SETS = ("registers", "cls", "reg:3", "patch:4")
PATCHES, PREFIX = 16, 5
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def doing(text, calibration, blocks=(0, 1, 2), **changes):
    return Intervention(parse_condition(text), blocks, calibration, **changes)


def seen(backbone, batch, intervention):
    """All tokens after each block under an intervention, (L, B, T, D)."""
    tokens = {}
    with intervened(backbone, batch.keys, PATCHES, intervention):  # first: looks see what it leaves
        looks = {
            Place(b, "RC2"): lambda t, b=b: tokens.update({b: t.clone()}) for b in range(len(backbone.blocks))
        }
        with tapped(backbone, len(batch.keys), looks), torch.no_grad():
            backbone([batch.pixels])
    return torch.stack(list(tokens.values()))


def test_nothing_replaced_is_the_plain_forward_bit_for_bit(backbone, batch):
    plain = backbone([batch.pixels])[0]
    found, places = features(backbone, batch.pixels, batch.keys, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)) and places.numel() == 0


@pytest.mark.parametrize("tokens", SETS)
@pytest.mark.parametrize("mode", MODES)
def test_only_the_named_tokens_after_the_named_block_are_replaced(backbone, batch, calibration, tokens, mode):
    full = seen(backbone, batch, None)
    intervention = doing(f"{tokens}:{mode}", calibration, (1,))
    found = seen(backbone, batch, intervention)
    places = slots(intervention.condition.tokens, batch.keys, 4, PATCHES, 0)
    at = torch.zeros(len(batch.keys), PREFIX + PATCHES, dtype=torch.bool).scatter(1, places, True)
    assert torch.equal(found[0], full[0]) and torch.equal(found[1][~at], full[1][~at])
    assert not torch.isclose(found[1][at], full[1][at]).all(dim=-1).any()
    assert (found[2] - full[2]).abs().amax(dim=-1).min() > 1e-6  # every token feels it a block later
    assert not any(module._forward_hooks for module in backbone.modules())


def test_each_mode_puts_in_what_its_name_says(backbone, batch, calibration):
    full = seen(backbone, batch, None)
    got = {mode: seen(backbone, batch, doing(f"registers:{mode}", calibration, (1,)))[1] for mode in MODES}
    got = {mode: tokens[:, 1:PREFIX] for mode, tokens in got.items()}
    own = full[1][:, 1:PREFIX]
    assert got["zero"].abs().max() == 0
    torch.testing.assert_close(got["mean"], calibration.mean[1, 1:PREFIX].expand_as(own))
    torch.testing.assert_close(got["random"].norm(dim=-1), own.norm(dim=-1))
    others = {tuple(tokens.flatten().tolist()) for tokens in own}
    assert {tuple(tokens.flatten().tolist()) for tokens in got["shuffle"]} == others
    assert all(not torch.equal(a, b) for a, b in zip(got["shuffle"], own, strict=True))
    banked = calibration.bank[:, 1, 1:PREFIX]
    assert all((banked == tokens).all(dim=(1, 2)).any() for tokens in got["bank"])


def test_the_mean_of_one_image_is_that_image(backbone, batch):
    alone = Batch(batch.indices[:1], batch.keys[:1], batch.labels[:1], batch.pixels[:1])
    own = calibrate(backbone, [alone], "", "", 1, 0)
    full = backbone([alone.pixels])[0]
    for mode in ("mean", "noise", "bank"):  # with no variance and a bank of one: all the same
        for tokens in ("registers", "cls"):
            found, _ = features(backbone, alone.pixels, alone.keys, doing(f"{tokens}:{mode}", own))
            for a, b in zip(full, found, strict=True):
                torch.testing.assert_close(a, b, **CLOSE)


def test_a_shuffle_that_moves_nothing_is_the_full_model(backbone, batch, calibration):
    def identity(_seed, _block, keys):
        return torch.arange(len(keys))

    full = backbone([batch.pixels])[0]
    still = doing("registers:shuffle", calibration, permutation=identity)
    found, _ = features(backbone, batch.pixels, batch.keys, still)
    assert all(torch.equal(a, b) for a, b in zip(full, found, strict=True))


def test_after_the_last_block_replacements_reach_no_patch(backbone, batch, calibration):
    full = backbone([batch.pixels])[0]
    last, _ = features(backbone, batch.pixels, batch.keys, doing("registers:zero", calibration, (2,)))
    assert torch.equal(last.patches, full.patches) and torch.equal(last.cls, full.cls)
    assert (last.registers - full.registers).abs().max() > 0.1
    torch.testing.assert_close(last.registers, backbone.norm.bias.expand_as(last.registers))
    first, _ = features(backbone, batch.pixels, batch.keys, doing("registers:zero", calibration, (0,)))
    assert (first.patches - full.patches).abs().amax(dim=-1).min() > 1e-4


def test_one_pass_shuffles_keep_the_registers_of_the_first_block_only(backbone, batch, calibration):
    full = seen(backbone, batch, None)
    found = seen(backbone, batch, doing("registers:shuffle", calibration))
    same = [
        {tuple(t.flatten().tolist()) for t in a[:, 1:PREFIX]}
        == {tuple(t.flatten().tolist()) for t in b[:, 1:PREFIX]}
        for a, b in zip(full, found, strict=True)
    ]
    assert same == [True, False, False]


@pytest.mark.parametrize("tokens", SETS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "shuffle"])
def test_batches_and_their_order_change_nothing(backbone, batch, calibration, tokens, mode):
    intervention = doing(f"{tokens}:{mode}", calibration)
    whole, _ = features(backbone, batch.pixels, batch.keys, intervention)
    for rows in ([3], [5, 0], [2, 4, 1]):
        keys = [batch.keys[row] for row in rows]
        part, _ = features(backbone, batch.pixels[rows], keys, intervention)
        for a, b in zip(whole, part, strict=True):
            torch.testing.assert_close(a[rows], b, **CLOSE)
    other = doing(f"{tokens}:{mode}", calibration, seed=1)
    differs = not torch.allclose(features(backbone, batch.pixels, batch.keys, other)[0].cls, whole.cls)
    assert differs == (mode in ("noise", "bank", "random") or tokens == "patch:4")


def test_noise_has_the_calibrations_mean_and_deviation(backbone, calibration):
    from pretrain.registers.interventions import replacement

    keys, places = [f"image {i}" for i in range(4000)], torch.tensor([[0, 3]]).expand(4000, -1)
    drawn = replacement(doing("reg:3:noise", calibration), 1, torch.zeros(4000, 2, 32), keys, places)
    mean, deviation = calibration.mean[1, [0, 3]], calibration.var[1, [0, 3]].sqrt()
    off = (drawn.mean(dim=0) - mean) / (deviation / 4000**0.5)
    assert off.abs().max() < 5 and off.square().mean() == pytest.approx(1, abs=0.6)  # of 64 values
    torch.testing.assert_close(drawn.std(dim=0), deviation, atol=0, rtol=0.06)
    apart = (drawn - mean) / deviation
    assert abs(float((apart[:, 0] * apart[:, 1]).mean())) < 0.02  # positions are drawn independently


def test_derangements_leave_nobody_in_place_and_are_all_as_likely():
    keys = ["a", "b", "c", "d"]
    found = [tuple(derangement(seed, 0, keys).tolist()) for seed in range(900)]
    assert all(row[i] != i for row in found for i in range(4)) and len(set(found)) == 9
    assert min(found.count(one) for one in set(found)) > 60  # 100 each, less 4 deviations
    assert tuple(derangement(0, 0, keys).tolist()) == found[0]
    with pytest.raises(InputError, match="a batch of one image"):
        derangement(0, 0, ["a"])


def test_a_test_time_register_is_the_last_register(image_set, batch):
    backbone = backbone_of(replace(MODEL, register_neurons=[[1, 3], [1, 7]]))
    known = calibrate(backbone, batches(image_set, range(5, 15), 5), "", "", 4, 0)
    full, found = (seen(backbone, batch, one) for one in (None, doing("registers:zero", known, (1,))))
    assert found.shape[2] == 6 + PATCHES and found[1][:, 1:6].abs().max() == 0
    assert torch.equal(found[1][:, 6:], full[1][:, 6:]) and full[1][:, 5].abs().min() > 0
    only, _ = features(backbone, batch.pixels, batch.keys, doing("reg:5:zero", known, (2,)))
    torch.testing.assert_close(only.registers[:, 4], backbone.norm.bias.expand(6, -1))


def test_gradients_pass_through_a_replacement(backbone, batch, calibration):
    pixels = batch.pixels.clone().requires_grad_()
    with intervened(backbone, batch.keys, PATCHES, doing("registers:zero", calibration)):
        backbone([pixels])[0].patches.sum().backward()
    assert pixels.grad.abs().max() > 0


def test_random_patches_belong_to_an_image_and_a_seed():
    keys = [f"{i}" for i in range(40)]
    found = slots(parse_condition("patch:4:zero").tokens, keys, 4, PATCHES, 0)
    assert all(len(set(row)) == 4 for row in found.tolist())
    assert set(found.flatten().tolist()) == set(range(PREFIX, PREFIX + PATCHES))  # all of them, and no others
    assert len(set(map(tuple, found.tolist()))) > 35
    assert torch.equal(slots(parse_condition("patch:2:zero").tokens, keys, 4, PATCHES, 0), found[:, :2])
    assert not torch.equal(slots(parse_condition("patch:4:zero").tokens, keys, 4, PATCHES, 1), found)


def test_conditions_and_blocks_are_read():
    assert [str(parse_condition(t)) for t in ("reg:2:mean", "patch:4:zero")] == ["reg:2:mean", "patch:4:zero"]
    assert [list(parse_blocks(text, 12)) for text in ("all", "3-5", "11")] == [[*range(12)], [3, 4, 5], [11]]
    for text in ("registers", "reg:zero", "reg:0:zero", "registers:2:zero", "cls:none", "patch:x:zero", ""):
        with pytest.raises(InputError, match="--conditions"):
            parse_condition(text)
    for text in ("12", "5-3", "3-", "-3", "x", "3-12", ""):
        with pytest.raises(InputError, match="--blocks"):
            parse_blocks(text, 12)


def test_what_a_model_does_not_have_is_refused_or_left_out():
    wanted = [parse_condition(text) for text in ("registers:zero", "reg:4:mean", "cls:zero", "patch:4:zero")]
    assert fitting(wanted, 4, 16) == wanted
    assert [str(c) for c in fitting(wanted, 0, 16)] == ["cls:zero", "patch:4:zero"]
    for registers, patches, words in ((3, 16, "registers 1 to 3"), (4, 4, "4 patches, one must stay")):
        with pytest.raises(InputError, match=words):
            fitting(wanted, registers, patches)
    with pytest.raises(InputError, match="no registers"):
        fitting(wanted[:2], 0, 16)
    with pytest.raises(InputError, match=f"keeps {BANK_PATCHES} patches"):
        fitting([parse_condition(f"patch:{BANK_PATCHES + 1}:bank")], 4, 16)
