"""Test-time registers: planted neurons are found and moved, nothing else changes, every program agrees."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.errors import InputError
from pretrain.export import read_export, write_export
from pretrain.sinder.hook_file import hook_text
from pretrain.start import load_backbone
from tests.sinder.planted import BLOCK, GAINS, MODELS, clean_backbone, plant
from tests.surgery.backbones import equal

FEW = ("--number", 24, "--held-out", 8)


@pytest.fixture(scope="module")
def defective(tmp_path_factory):
    """Exports with a planted defect, by kind."""
    folder, found = tmp_path_factory.mktemp("defective"), {}
    for name, model in MODELS.items():
        backbone = clean_backbone(model)
        plant(backbone, gain=GAINS.get(name, 6.0))
        found[name] = write_export(folder / f"{name}.safetensors", backbone.state_dict(), model, {})
    return found


def spread(path, folder, parts):
    """The same defect made by several hidden units, each with a share of it."""
    export = read_export(path)
    state = {name: tensor.clone() for name, tensor in export.state.items()}
    for unit in range(parts):
        for name in ("fc1.weight", "fc1.bias"):
            state[f"blocks.{BLOCK}.mlp.{name}"][unit] = export.state[f"blocks.{BLOCK}.mlp.{name}"][0]
        column = export.state[f"blocks.{BLOCK}.mlp.fc2.weight"][:, 0] / parts
        state[f"blocks.{BLOCK}.mlp.fc2.weight"][:, unit] = column
    return write_export(folder / "spread.safetensors", state, export.model, {})


@pytest.mark.parametrize("name", MODELS)
def test_the_planted_unit_is_found_and_the_defects_are_gone(name, defective, photos, sinder, tmp_path):
    path, out, hook = defective[name], tmp_path / "out.safetensors", tmp_path / "hook.py"
    done = sinder("registers", path, "--images", photos, "--out", out, "--hook", hook, *FEW)
    assert done.status == 0 and f"block {BLOCK}: 0\n" in done.out, done.err
    assert f"{out}: removed by 1 neuron (" in done.out and done.out.count("; now clean\n") == 1
    original, export = read_export(path), read_export(out)
    assert export.model == replace(original.model, register_neurons=[[BLOCK, 0]])
    assert equal(export.state, original.state)
    report = export.about["test_time_registers"]
    assert (report["images"], report["held_out"], report["neurons"][0]["unit"]) == (24, 8, 0)
    before, after = report["before"]["by_both"], report["after"]
    for index in range(BLOCK, len(before)):
        assert before[index] > 0.005 and after["by_both"][index] < before[index] / 10
    assert 0.99 < after["cls_cosine"] < 1 and 0.99 < after["patch_cosine"] < 1
    assert hook.read_text() == hook_text([[BLOCK, 0]])


def test_the_fewest_neurons_that_do_are_taken_or_as_many_as_asked_for(defective, photos, sinder, tmp_path):
    path, out = spread(defective["mlp"], tmp_path, 4), tmp_path / "out.safetensors"
    command = ("registers", path, "--images", photos, "--out", out, *FEW)
    assert sinder(*command).status == 0
    chosen = read_export(out).model.register_neurons
    assert chosen[:4] == [[BLOCK, unit] for unit in range(4)] and len(chosen) == 5
    done = sinder(*command, "--neurons", 2, "--force")
    assert done.status == 0 and "reduced by 2 neurons" in done.out
    report = read_export(out).about["test_time_registers"]
    assert {neuron["unit"] for neuron in report["neurons"]} < set(range(4)) and len(report["neurons"]) == 2
    done = sinder(*command, "--neurons", 4, "--last-block", BLOCK - 1, "--force")
    assert done.status == 0 and f"neurons of blocks 0 to {BLOCK - 1}, found on 24 " in done.out
    assert "removed" not in done.out  # the units of the block that makes the defects are not among them


def test_drift_beyond_the_limits_is_not_written(defective, photos, sinder, tmp_path):
    out = tmp_path / "out.safetensors"
    command = ("registers", defective["mlp"], "--images", photos, "--out", out, *FEW, "--neurons", 1)
    done = sinder(*command, "--min-patch-cosine", 0.99999)
    assert done.status == 0 and "too much drift, nothing written" in done.out and not out.exists()


def test_a_clean_model_stays_as_it_is(photos, sinder, tmp_path):
    model = MODELS["mlp"]
    path = write_export(tmp_path / "clean.safetensors", clean_backbone(model).state_dict(), model, {})
    out, hook = tmp_path / "out.safetensors", tmp_path / "hook.py"
    done = sinder("registers", path, "--images", photos, "--out", out, "--hook", hook, *FEW)
    assert done.status == 0 and "nothing to do, nothing written" in done.out
    assert not out.exists() and not hook.exists()


def test_a_source_of_another_format_becomes_an_export(defective, photos, sinder, tmp_path):
    source, out = tmp_path / "released.pth", tmp_path / "out.safetensors"
    state = read_export(defective["swiglu"]).state
    torch.save({**state, "head.weight": torch.ones(2)}, source)
    done = sinder("registers", source, "--num-heads", 4, "--images", photos, "--out", out, *FEW)
    assert done.status == 0 and "\nlost: 1 tensors: head.weight (no part of a backbone)\n" in done.out
    assert equal(read_export(out).state, state)
    done = sinder("diagnose", out, "--images", photos)
    assert done.status == 0 and "\nclean: " in done.out
    done = sinder("registers", out, "--images", photos, "--out", tmp_path / "b.safetensors", *FEW)
    assert done.status == 2 and "has a test-time register already; give the file it was made" in done.err


def test_wrong_input_is_one_line(defective, photos, sinder, tmp_path):
    path, out = defective["mlp"], tmp_path / "out.safetensors"
    command = ("registers", path, "--images", photos, "--out", out)
    for more, words in (
        (("--number", 90), "holds 96 images, 106 are needed (16 held out and 90 to find neurons on"),
        (("--neurons", 0), "--neurons: 0 must be from 1 to 256"),
        (("--last-block", 6), "--last-block: 6 must be from 0 to 5"),
        (("--number", 0), "--number: must be at least 1"),
        (("--hook", tmp_path / "hook.txt"), "hook.txt: a Python file is written; name it *.py"),
        (("--hook", Path(__file__)), "test_registers.py: exists; choose another name"),
        (("--out", tmp_path / "out.pth"), "--to ours writes a .safetensors file; name it so"),
        (("--out", path), "exists; choose another name"),
    ):
        done = sinder(*command, *more)
        assert done.status == 2 and words in done.err and done.err.count("\n") == 1
        assert not out.exists()


def test_training_does_not_start_from_it(tmp_path):
    model = replace(MODELS["mlp"], register_neurons=[[0, 0]])
    backbone = clean_backbone(MODELS["mlp"])
    path = write_export(tmp_path / "a.safetensors", backbone.state_dict(), model, {})
    with pytest.raises(InputError, match="has a test-time register, which training does not"):
        load_backbone(backbone, path)
