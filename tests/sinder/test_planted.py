"""A defect that was planted is found, named and repaired, in every kind of backbone and every layout."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretrain.analysis.images import ImageSet
from pretrain.export import read_export, write_export
from pretrain.export.transform import Order, convert
from pretrain.export.weights import read_weights
from tests.sinder.planted import BLOCK, GAINS, MODELS, clean_backbone, plant
from tests.surgery.backbones import equal, place

REPAIR = (
    *("--least", 2, "--limit-layers", 1, "--window", 160, "--stop-share", 0.97),
    *("--check-every", 80, "--batch-size", 8, "--max-images", 480),
)


@pytest.fixture(scope="module")
def defective(tmp_path_factory):
    """Exports with a planted defect, and the planted directions, by kind."""
    folder, found = tmp_path_factory.mktemp("defective"), {}
    for name, model in MODELS.items():
        backbone = clean_backbone(model)
        direction = plant(backbone, gain=GAINS.get(name, 6.0))
        found[name] = (
            write_export(folder / f"{name}.safetensors", backbone.state_dict(), model, {}),
            direction,
        )
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("clean"), {}
    for name, model in MODELS.items():
        state = clean_backbone(model).state_dict()
        found[name] = write_export(folder / f"{name}.safetensors", state, model, {})
    return found


@pytest.mark.parametrize("name", MODELS)
def test_diagnose_names_the_layer_and_the_direction(name, defective, photos, sinder):
    path, planted = defective[name]
    found = json.loads(sinder("diagnose", path, "--images", photos, "--json").out)
    assert (found["verdict"], found["first_block"]) == ("defective", BLOCK)
    layer = found["layers"][BLOCK]
    assert abs(torch.tensor(layer["direction"]) @ planted) > 0.98
    assert layer["norm_ratio"] > 3 and layer["predicted_cosine"] > 0.95 and layer["between_images"] > 0.9
    assert max(range(len(found["layers"])), key=lambda i: found["layers"][i]["gain"]) == BLOCK
    done = sinder("diagnose", path, "--images", photos)
    assert done.status == 0 and f"defective: after block {BLOCK}, " in done.out


@pytest.mark.parametrize("name", MODELS)
def test_a_clean_model_is_clean_and_nothing_is_written(name, clean, photos, sinder, tmp_path):
    done = sinder("diagnose", clean[name], "--images", photos)
    assert done.status == 0 and "clean: after no block " in done.out
    out = tmp_path / "out.safetensors"
    done = sinder("repair", clean[name], "--images", photos, "--out", out)
    assert done.status == 0 and "nothing to repair, nothing written" in done.out
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_predict_and_do_not_judge(defective, sinder):
    plain, biased = (sinder("diagnose", defective["mlp"][0], *flags) for flags in ((), ("--biases",)))
    for done in (plain, biased):
        assert done.status == 0 and "unknown: weights predict where tokens would grow" in done.out
    assert plain.out != biased.out


@pytest.mark.parametrize("name", MODELS)
def test_repair_removes_the_defect_and_keeps_the_rest(name, defective, photos, sinder, tmp_path):
    path, _ = defective[name]
    out = tmp_path / "repaired.safetensors"
    done = sinder("repair", path, "--images", photos, "--out", out, *REPAIR)
    assert done.status == 0, done.err
    export, original = read_export(out), read_export(path)
    report = export.about["sinder"]
    for before, after in list(zip(report["before"]["by_angle"], report["after"]["by_angle"], strict=True))[
        BLOCK:
    ]:
        assert before > 0.01 and after < before / 10
    assert report["after"]["cls_cosine"] > 0.99 and report["after"]["patch_cosine"] > 0.99
    assert report["outcome"] in ("repaired", "images used up") and report["verdict_after"] != "defective"
    changed = {key for key in original.state if not torch.equal(original.state[key], export.state[key])}
    assert {key for key in changed if key.startswith(f"blocks.{BLOCK}.")}
    assert all(int(key.split(".")[1]) >= BLOCK and key.endswith("weight") for key in changed)
    queries_and_keys = slice(0, 2 * original.model.embed_dim)
    key = f"blocks.{BLOCK}.attn.qkv.weight"
    assert torch.equal(original.state[key][queries_and_keys], export.state[key][queries_and_keys])
    assert export.model == original.model and not list(tmp_path.glob("*.progress*"))


@pytest.mark.parametrize("target", ["dinov2", "dinov2-chunked", "huggingface", "timm"])
def test_every_layout_is_repaired_alike_and_written_as_it_was(target, defective, photos, sinder, tmp_path):
    path, _ = defective["swiglu-registers"]
    source, out = place(tmp_path, target), tmp_path / ("out.pth" if "dinov2" in target else "out")
    convert(path, target, Order(source, allow_loss=True), chunks=2)
    short = (*REPAIR, "--max-images", 16)
    assert sinder("repair", source, "--images", photos, "--out", out, *short).status == 0
    ours = tmp_path / "ours.safetensors"
    assert sinder("repair", path, "--images", photos, "--out", ours, *short).status == 0
    before, after, expected = read_weights(source), read_weights(out), read_export(ours)
    assert after.form == before.form and after.form.target == target
    weights = [name for name in expected.state if ".mlp." in name or ".attn." in name]
    assert equal({n: after.state[n] for n in weights}, {n: expected.state[n] for n in weights})


def test_an_interrupted_repair_goes_on_exactly(defective, photos, sinder, tmp_path, monkeypatch):
    path, _ = defective["mlp"]
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    command = ("repair", path, "--images", photos, *REPAIR, "--check-every", 24, "--max-images", 120, "--out")
    assert sinder(*command, whole).status == 0
    from pretrain.sinder.repair import Repair

    steps = []

    def stopped(self, images, taken=None):
        steps.append(taken)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return step(self, images, taken)

    step = Repair.step
    with monkeypatch.context() as patch:
        patch.setattr(Repair, "step", stopped)
        assert sinder(*command, parts).status == 130
    assert not parts.exists() and parts.with_name("parts.safetensors.progress").exists()
    other = sinder(*command, parts, "--lr", 0.1)
    assert other.status == 2 and "is of a repair with other weights or settings; remove it" in other.err
    assert sinder(*command, parts).status == 0
    assert equal(read_export(parts).state, read_export(whole).state)


def test_drift_stops_a_repair_at_the_last_good_state(defective, photos, sinder, tmp_path):
    path, _ = defective["mlp"]
    out = tmp_path / "out.safetensors"
    command = ("repair", path, "--images", photos, "--out", out, *REPAIR, "--lr", 0.5, "--check-every", 8)
    done = sinder(*command)
    assert done.status == 0 and "stopped by drift" in done.out
    if out.exists():
        report = read_export(out).about["sinder"]
        assert report["after"]["cls_cosine"] >= 0.98 and report["after"]["patch_cosine"] >= 0.98


def test_a_repair_that_finds_nothing_to_train_says_so_and_leaves_no_file(defective, photos, sinder, tmp_path):
    out = tmp_path / "out.safetensors"
    command = ("repair", defective["mlp"][0], "--images", photos, "--out", out, "--least", 1000)
    done = sinder(*command, "--window", 16, "--max-images", 16, "--check-every", 8)
    assert done.status == 0 and f"{out}" not in done.out
    assert "nothing trained after 16 images, nothing written; still defective" in done.out
    assert list(tmp_path.iterdir()) == []


def test_drift_is_seen_where_the_last_images_are_damaged(defective, photos, sinder, tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out.safetensors"
    folder.mkdir()
    for source in sorted(Path(photos).iterdir())[:28]:
        (folder / source.name).write_bytes(source.read_bytes())
    order = ImageSet(str(folder), 128).shuffled(0)
    names = sorted(path.name for path in folder.iterdir())
    for last in range(4, 8):
        (folder / names[order(last)]).write_bytes(b"\x89PNG broken")
    command = ("repair", defective["mlp"][0], "--images", folder, "--out", out, "--lr", 0.5, "--least", 1)
    done = sinder(*command, "--batch-size", 4, "--max-images", 8, "--held-out", 8)
    assert done.status == 0 and "stopped by drift after 0 images, nothing written" in done.out
    assert not out.exists()


def test_wrong_input_is_one_line(defective, photos, sinder, tmp_path):
    path, _ = defective["mlp"]
    out, few = tmp_path / "out.safetensors", tmp_path / "few"
    few.mkdir()
    for index in range(3):
        Image.new("RGB", (150, 140), (index, 9, 9)).save(few / f"{index}.png")
    (tmp_path / "resnet.pth").write_bytes(b"<html>")
    repair = ("repair", path, "--out", out, "--images")
    for command, words in (
        ((*repair, few), f"{few} holds 3 images, at least 24 are needed (16 held out and a batch of 8)"),
        (("diagnose", path, "--images", few), f"{few} holds 3, 16 are asked for"),
        (("diagnose", path, "--images", tmp_path / "none"), "none"),
        (("diagnose", tmp_path / "resnet.pth"), "a web page, not weights"),
        ((*repair, photos, "--size", 100), "--size: 100 px is not a multiple of the patch size 8"),
        ((*repair, photos, "--limit-layers", 0), "--limit-layers: must be at least 1"),
        ((*repair, photos, "--size", 0), "--size: must be at least 1"),
        ((*repair, photos, "--lr", -1), "--lr: -1 must be above 0"),
        ((*repair, photos, "--lr", "nan"), "--lr: nan must be above 0"),
        ((*repair, photos, "--stop-share", 0), "--stop-share: 0 must be above 0, and 1 at most"),
        ((*repair, photos, "--min-cls-cosine", "nan"), "--min-cls-cosine: a cosine is from -1 to 1"),
        (
            ("diagnose", path, "--device", "gpu"),
            "--device: gpu: this machine, or its torch, has no such device",
        ),
        (("repair", path, "--out", path, "--images", photos), "exists; choose another name"),
        (("repair", path, "--out", out), "the following arguments are required: --images"),
    ):
        done = sinder(*command)
        assert done.status == 2 and words in done.err and done.err.count("\n") == 1
        assert not out.exists()


def test_damaged_images_are_left_out_and_named(defective, photos, sinder, tmp_path):
    path, _ = defective["mlp"]
    folder = tmp_path / "photos"
    folder.mkdir()
    for source in sorted(Path(photos).iterdir())[:40]:
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / "0003.png").write_bytes(b"\x89PNG broken")
    done = sinder("diagnose", path, "--images", folder, "--number", 40)
    assert done.status == 0 and done.err.startswith("sinder.py: left out: ") and "0003.png" in done.err
    out = tmp_path / "out.safetensors"
    done = sinder("repair", path, "--images", folder, "--out", out, *REPAIR, "--max-images", 40)
    assert done.status == 0 and out.exists()


def test_half_precision_stays(defective, photos, sinder, tmp_path):
    path, _ = defective["swiglu"]
    export = read_export(path)
    half = {name: tensor.bfloat16() for name, tensor in export.state.items()}
    source = write_export(tmp_path / "half.safetensors", half, export.model, {})
    out = tmp_path / "out.safetensors"
    short = (*REPAIR, "--max-images", 24, "--bf16")
    assert sinder("repair", source, "--images", photos, "--out", out, *short).status == 0
    state = read_export(out).state
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    changed = {name for name in state if not torch.equal(state[name], half[name])}
    assert changed and all(int(name.split(".")[1]) >= BLOCK for name in changed)
    assert replace(export.model, layer_scale=1.0) == export.model
