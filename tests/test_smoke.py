"""Recipes at toy size give the recorded curves, and a changed one is told apart."""

import json

import pytest
import torch

from pretrain.config.keys import settings
from pretrain.config.load import load_config
from pretrain.config.toy import EXECUTION, OWN_IBOT_HEAD, SIZE, SPANS, STEPS, toy_overrides
from tests.scripts import load, runner
from tests.test_configs import header

smoke = load("smoke")
RECORDED = json.loads(smoke.RECORDED.read_text())["curves"]
LOSSES = {"loss/total": [3.0, 2.5, *[2.0] * (STEPS - 2)], "loss/koleo": [-0.1] * STEPS}


@pytest.fixture
def run(shards, tmp_path, monkeypatch, capsys):
    """The tool in a fresh folder, with the digits there."""
    (tmp_path / smoke.WORK).mkdir(parents=True)
    (tmp_path / smoke.WORK / "digits").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield runner("smoke", capsys, monkeypatch)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("recipe", ["vits_mlp", "swav_rmlp"])
def test_a_recipe_gives_its_recorded_curve(run, recipe):
    done = run("--only", recipe)
    assert done.status == 0, done.err
    assert "as recorded" in done.out and "NOT" not in done.out and not done.err


def test_a_changed_recipe_is_told(run):
    done = run("--only", "vits_mlp", "loss.student_temp=0.11")
    assert done.status == 1 and "NOT" in done.out
    named, advice = done.err.splitlines()
    assert named.startswith("smoke.py: vits_mlp: NOT as recorded from step 1 on (loss/dino_global ")
    assert "metrics.jsonl of runs/smoke/vits_mlp" in advice


def test_settings_are_not_recorded(run):
    done = run("--write", "loss.student_temp=0.11")
    assert done.status == 2 and "leave the settings out" in done.err


def test_writing_one_curve_keeps_the_others(tmp_path, monkeypatch):
    copy = tmp_path / "curves.json"
    copy.write_text(smoke.RECORDED.read_text())
    monkeypatch.setattr(smoke, "RECORDED", copy)
    smoke.record({"demo": LOSSES})
    assert json.loads(copy.read_text())["curves"] == RECORDED | {"demo": LOSSES}


def test_every_recipe_has_a_recorded_curve():
    assert list(RECORDED) == smoke.recipes()
    for curves in RECORDED.values():
        assert "loss/total" in curves and all(len(values) == STEPS for values in curves.values())
        assert max(curves["loss/total"]) - min(curves["loss/total"]) > 0.1  # a flat one would prove little


def test_what_is_left_out_is_no_recipe():
    paths = {path.stem: " ".join(header(path)) for path in smoke.CONFIGS.glob("*.yaml")}
    assert {n for n, text in paths.items() if "not a recipe of its own" in text} == set(smoke.NO_RECIPES)


@pytest.mark.parametrize(
    ("term", "step", "value", "reason"),
    [
        ("loss/total", 2, 2.51, "nothing is learnt by then"),
        ("loss/total", 7, 2.01, "a gradient, the optimizer or a schedule differs"),
        ("loss/total", 7, None, "loss/total none, recorded 2.0000"),
    ],
)
def test_the_line_says_where_and_what_it_means(term, step, value, reason):
    here = {name: list(values) for name, values in LOSSES.items()}
    here[term][step - 1] = value
    line = smoke.explain(smoke.compare("demo", here, LOSSES))
    assert line.startswith(f"demo: NOT as recorded from step {step} on") and reason in line


def test_rounding_and_small_losses_do_not_count_but_missing_terms_do():
    near = {"loss/total": [v * 1.00005 for v in LOSSES["loss/total"]], "loss/koleo": [-0.10005] * STEPS}
    assert smoke.compare("demo", near, LOSSES).first is None
    far = near | {"loss/koleo": [-0.1005] * STEPS}
    assert smoke.compare("demo", far, LOSSES).first and not smoke.compare("demo_rmlp", far, LOSSES).first
    fewer = {"loss/total": LOSSES["loss/total"]}
    assert smoke.compare("demo", fewer, LOSSES).first.term == "loss/koleo"
    assert smoke.compare("demo", LOSSES, {}).first.step == 1
    assert "--only demo --write" in smoke.explain(smoke.compare("demo", LOSSES, {}))


def test_a_run_of_other_length_differs_from_where_one_ends():
    longer = {name: [*values, 1.0] for name, values in LOSSES.items()}
    for curves in ((longer, LOSSES), (LOSSES, longer)):
        assert smoke.compare("demo", *curves).first.step == STEPS + 1


@pytest.mark.parametrize("recipe", ["vitl_mlp_long", "rmlp_scans", "swav_demo_rmlp"])
def test_a_toy_differs_from_its_recipe_in_size_alone(recipe, shards):
    path = smoke.CONFIGS / f"{recipe}.yaml"
    whole = load_config(path)
    toy = load_config(path, toy_overrides(whole, f"{shards}/train-*.tar"))
    before, after = settings(whole), settings(toy)
    spans = {f"{section}.{name}" for section, names in SPANS.items() for name in names}
    others = {"run.steps", "model.layer_scale", "data.shards", "optim.lr", "optim.min_lr"}
    others |= {"method.queue", "engine.accumulation_steps"}
    allowed = {*SIZE, *OWN_IBOT_HEAD, *EXECUTION, *spans, *others}
    assert {key for key in before if before[key] != after[key]} <= allowed
    assert (toy.optim.lr == toy.optim.min_lr) == (whole.optim.lr == whole.optim.min_lr)
    for key in spans:
        assert bool(before[key]) == bool(after[key])
