"""Matches against known warps, probes and recall against what features tell, findings against intervals."""

import numpy as np
import pytest
import torch

from pretrain.analysis.uncertainty import Interval
from pretrain.errors import InputError
from pretrain.registers.classification import fit_probe, probe_hits, recall_at_one
from pretrain.registers.correspondence import match
from pretrain.registers.findings import findings
from pretrain.registers.looks import FULL, Looked, Seen
from pretrain.registers.measures import Oddness
from pretrain.registers.results import Effect, Paired, Result, Score, compared
from pretrain.registers.tasks import classification
from pretrain.registers.warps import centres, moved, random_warp, warped


def test_points_of_an_image_go_where_its_warp_says():
    for key in "abcdef":
        warp = random_warp(0, key)
        point = torch.tensor([0.3, -0.2], dtype=torch.float64)
        line = (2 * torch.arange(64, dtype=torch.float64) + 1) / 64 - 1
        y, x = torch.meshgrid(line, line, indexing="ij")
        dot = torch.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / 0.02)[None].float()
        shown = warped(dot, warp)[0].double()
        found = torch.stack([(shown * x).sum(), (shown * y).sum()]) / shown.sum()
        torch.testing.assert_close(found, moved(warp, point), atol=0.02, rtol=0)


def test_warps_are_moderate_differ_and_come_back():
    warps = [random_warp(0, f"{i}") for i in range(60)]
    assert len({tuple(w.flatten().tolist()) for w in warps}) == 60
    assert torch.equal(random_warp(0, "3"), warps[3]) and not torch.equal(random_warp(1, "3"), warps[3])
    affine = sum(bool((w[2] == torch.tensor([0, 0, 1])).all()) for w in warps)
    assert 15 < affine < 45
    inside = [float((moved(w, centres(8)).abs() < 1).all(-1).double().mean()) for w in warps]
    assert min(inside) > 0.4 and np.mean(inside) > 0.7


def test_features_of_the_place_are_matched_and_others_are_not():
    tokens = torch.randn(36, 16, generator=torch.Generator().manual_seed(0))
    same = torch.eye(3, dtype=torch.float64)
    assert match(tokens, 3 * tokens, same) == (100, 100)
    other = torch.randn(36, 16, generator=torch.Generator().manual_seed(1))
    assert match(tokens, other, same).accuracy < 60
    shift = same.clone()
    shift[0, 2] = 2 * 2 / 6  # by two patches to the right: the last two columns leave
    grid = tokens.unflatten(0, (6, 6))
    gone = torch.cat([other.unflatten(0, (6, 6))[:, :2], grid[:, :-2]], dim=1).flatten(0, 1)
    assert match(tokens, gone, shift) == (100, 100)
    assert match(tokens, tokens, shift).accuracy == 0  # two patches off
    shift[0, 2] = 2 / 6
    assert match(tokens, tokens, shift).accuracy == 100  # one patch off is near enough
    shift[0, 2] = 3
    assert match(tokens, tokens, shift) is None


def test_replaced_patches_neither_look_for_a_match_nor_are_one():
    tokens = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    broken, kept = tokens.clone(), torch.ones(16, dtype=torch.bool)
    broken[5], kept[5] = 100 * tokens[10], False  # it would be what patch 10 and itself find
    same, every = torch.eye(3, dtype=torch.float64), torch.ones(16, dtype=torch.bool)
    assert match(broken, broken, same, (kept, kept)) == (100, 100)
    assert match(tokens, broken, same, (every, every)).accuracy < 100


def test_probes_and_recall_find_what_features_tell():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    telling = torch.eye(3)[labels] @ torch.randn(3, 8, generator=generator)
    telling += 0.05 * torch.randn(60, 8, generator=generator)
    probe = fit_probe(telling[:30], labels[:30])
    hits = probe_hits(probe, telling[30:], labels[30:])
    assert hits.shape == (30,) and hits.min() == 100 and recall_at_one(telling, labels).min() == 100
    wrong = probe_hits(probe, telling[30:], (labels[30:] + 1) % 3)
    assert wrong.max() == 0
    assert recall_at_one(telling[:1], labels[:1]).isnan().all()  # there is no other image
    noise = torch.randn(60, 8, generator=generator)
    assert recall_at_one(noise, labels).mean() < 70
    constant = fit_probe(torch.ones(30, 8), labels[:30])
    assert probe_hits(constant, torch.ones(30, 8), labels[30:]).mean() == pytest.approx(100 / 3)


def test_a_fixed_probe_fails_where_features_turn_and_a_refit_one_does_not(calibration):
    labels = torch.arange(60) % 3
    telling = torch.eye(3)[labels] + 0.05 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    turned = telling.roll(1, dims=1)  # each class where another one was

    def looked(rows):
        seen = {
            name: Seen(Oddness(calibration), [values[rows]], [values[rows]])
            for name, values in {FULL: telling, "cls:mean": turned}.items()
        }
        return Looked(seen, labels[rows].tolist())

    scores = classification(looked(slice(30)), looked(slice(30, 60)))
    for words in ("class token", "mean patch"):
        fixed, refit = (scores[f"linear, {words}, {kind}"] for kind in ("fixed", "refit"))
        assert fixed[FULL].own.min() == refit[FULL].own.min() == 100 == refit["cls:mean"].own.min()
        assert fixed["cls:mean"].own.max() == 0 and torch.equal(fixed["cls:mean"].full, fixed[FULL].own)
        assert scores[f"recall@1, {words}"]["cls:mean"].own.min() == 100
    with pytest.raises(InputError, match="one class only"):
        classification(looked([0, 3, 6]), looked(slice(30, 60)))


def test_scores_are_paired_by_image_and_those_without_are_left_out():
    full = torch.tensor([100.0, 0, 100, 100, torch.nan])
    own = torch.tensor([0.0, 0, 100, torch.nan, 100])
    found = compared({"task": {FULL: Paired(full, full), "cls:zero": Paired(own, full)}}, 0)["task"]
    assert found[FULL].score.mean == 75 and found[FULL].difference is None
    assert found["cls:zero"].score.mean == 50 and found["cls:zero"].p_value == 1
    assert found["cls:zero"].difference.mean == pytest.approx(-100 / 3)


@pytest.mark.parametrize(
    ("bank", "p", "verdict"),
    [
        (Interval(-0.2, -0.9, 0.3), 0.3, "not needed"),
        (Interval(-0.2, -1.9, 0.3), 0.3, "undecided"),
        (Interval(-5.0, -8.0, -2.0), 0.0001, "needed"),
        (Interval(-5.0, -8.0, -2.0), 0.04, "undecided"),  # two comparisons: 0.025 is asked for
    ],
)
def test_intervals_decide_and_zeros_do_not(bank, p, verdict):
    whole = Score(Interval(70, 69, 71), None, None)
    scores = {
        FULL: whole,
        "registers:zero": Score(whole.score, Interval(-30, -32, -28), 0.0001),
        "registers:mean": Score(whole.score, Interval(0.1, -0.2, 0.4), 0.8),
        "registers:bank": Score(whole.score, bank, p),
        "patch:4:mean": Score(whole.score, Interval(-9, -10, -8), 0.0001),
    }
    effects = {name: Effect(1, 1, 1, {}, {}) for name in scores if name != FULL}
    (found,) = findings(Result(100, 5.0, effects, {"task": scores}))
    assert (found.tokens, found.verdict) == ("registers", verdict)
    assert "zeros at worst -30.0 points" in found.line
