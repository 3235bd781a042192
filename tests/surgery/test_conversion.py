"""Every pair of formats, there and back: bits, names, settings, features, and what is lost on the way."""

from dataclasses import replace
from functools import cache
from typing import get_args

import pytest
import torch

from pretrain.errors import InputError
from pretrain.export import read_export, write_export
from pretrain.export.transform import Order, convert
from pretrain.export.weights import read_weights
from pretrain.surgery.conversion import Form, Target, read_backbone, write_layout
from pretrain.surgery.layouts import HUGGING_FACE_MODULES, from_ours
from tests.golden_files import load, relative_error, section
from tests.surgery.backbones import MODELS, equal, features, images_for, place, random_state

FORMATS = get_args(Target)


@cache
def start(name):
    """Weights of a model, images, and its features; nobody changes them."""
    model = MODELS[name]
    state, images = random_state(model), images_for(model)
    return state, images, features(state, model, images)


def held_by_timm(state, model):
    """What comes back from timm: no mask token; with registers, the class position in the class token."""
    expected = {**state, "mask_token": torch.zeros_like(state["mask_token"])}
    if model.num_register_tokens:
        expected["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        expected["pos_embed"] = state["pos_embed"].clone()
        expected["pos_embed"][:, 0] = 0
    return expected


def as_held(state, model, formats):
    return held_by_timm(state, model) if "timm" in formats else state


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_every_pair_of_formats_there_and_back(first, second, name):
    model = MODELS[name]
    state, images, expected = start(name)
    back = state
    for target in (first, second):
        named = write_layout(back, model, target, chunks=2)
        back = read_backbone(named, described=model).state
    assert equal(back, as_held(state, model, (first, second)))
    assert relative_error(features(back, model, images), expected) < 1e-6


@pytest.mark.parametrize("name", ["mlp", "swiglu-registers", "no-layerscale"])
@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_every_pair_of_files_there_and_back(first, second, name, tmp_path):
    model, path = MODELS[name], tmp_path / "start.safetensors"
    state = start(name)[0]
    write_export(path, state, model, {"step": 3})
    for target in (first, second, "ours"):
        path, source = place(tmp_path, target), path
        convert(source, target, Order(path, allow_loss=True), chunks=2)
    back = read_export(path)
    assert equal(back.state, as_held(state, model, (first, second)))
    assert back.model == model  # the description travels with every format
    assert back.about["step"] == 3 and len(back.about["provenance"]) == 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", FORMATS)
def test_a_loss_is_refused_without_permission_and_listed_with_it(target, name, tmp_path):
    model, source = MODELS[name], tmp_path / "a.safetensors"
    write_export(source, random_state(model), model, {})
    out = place(tmp_path, target)
    if target != "timm":
        assert not [c for c in convert(source, target, Order(out), chunks=2).changes if c.kind == "lost"]
        return
    with pytest.raises(InputError, match=r"would be lost: mask_token .*--allow-loss"):
        convert(source, target, Order(out))
    assert not out.exists()
    lost = [c.what for c in convert(source, target, Order(out, allow_loss=True)).changes if c.kind == "lost"]
    folded = ["cls_token and its position as two tensors"] if model.num_register_tokens else []
    assert lost == ["mask_token", *folded]


def test_what_holds_nothing_is_no_loss(tmp_path):
    model, source = MODELS["registers"], tmp_path / "a.safetensors"
    state = random_state(model)
    state["mask_token"].zero_()
    state["pos_embed"][:, 0] = 0
    write_export(source, state, model, {})
    done = convert(source, "timm", Order(tmp_path / "timm"))
    assert done.changes == ()
    assert equal(read_weights(tmp_path / "timm").state, state)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", FORMATS)
def test_weights_alone_tell_the_architecture(target, name):
    """Without our description: what a stranger's file gives."""
    model = MODELS[name]
    state = random_state(model)
    found = read_backbone(write_layout(state, model, target, chunks=2))
    assert found.form == Form("dinov2" if target == "ours" else target, 2 if "chunked" in target else 4)
    sized = model.num_register_tokens > 0 or target == "timm"
    convention = {"pos_embed_antialias": sized, "pos_embed_offset": 0.0 if sized else 0.1}
    always_scaled = target == "huggingface" and model.layer_scale is None
    expected = replace(model, layer_scale=1.0) if always_scaled else model
    assert found.model == replace(expected, **convention)
    reduced = {n: t for n, t in found.state.items() if not (always_scaled and n.endswith("gamma"))}
    assert equal(reduced, held_by_timm(state, model) if target == "timm" else state)


@pytest.mark.parametrize(
    "prefix", ["backbone.", "module.backbone.", "teacher.backbone.", "model.", "dinov2."]
)
def test_prefixes_are_found(prefix):
    model = MODELS["mlp"]
    state = random_state(model)
    found = read_backbone({prefix + name: tensor for name, tensor in state.items()})
    assert equal(found.state, state) and prefix.rstrip(".") in found.layout


@pytest.mark.parametrize("split", [False, True])
def test_the_three_layouts_of_swiglu_and_both_of_attention_hold_the_same(split):
    model = MODELS["swiglu"]
    state = random_state(model)
    named = write_layout(state, model, "dinov2", 4, split_swiglu=split)
    assert ("blocks.0.mlp.w1.weight" in named) is split
    assert equal(read_backbone(named).state, state)
    modules = from_ours(state, HUGGING_FACE_MODULES)
    assert "encoder.layer.0.mlp.gate_proj.weight" in modules
    assert equal(read_backbone(modules).state, state)


def test_block_chunks_are_numbered_as_in_the_original():
    state = random_state(replace(MODELS["mlp"], depth=5))
    names = write_layout(state, replace(MODELS["mlp"], depth=5), "dinov2-chunked", 2)
    starts = {tuple(name.split(".")[1:3]) for name in names if name.startswith("blocks.")}
    assert starts == {("0", "0"), ("0", "1"), ("1", "2"), ("1", "3"), ("2", "4")}


def test_a_training_checkpoint_gives_either_branch_and_says_what_it_leaves():
    model = MODELS["mlp"]
    branches = {"student": random_state(model, 1), "teacher": random_state(model, 2)}
    whole = {f"{b}.backbone.{n}": t for b, state in branches.items() for n, t in state.items()}
    whole |= {"teacher.dino_head.mlp.0.weight": torch.ones(2), "dino_loss.center": torch.ones(1, 2)}
    for branch, other in (("student", "teacher"), ("teacher", "student"), (None, "student")):
        found = read_backbone(whole, branch)
        assert equal(found.state, branches[branch or "teacher"])
        left = {c.what for c in found.changes if c.kind == "left out"}
        assert left == {f"{other}.backbone", "teacher.dino_head", "dino_loss"}
    with pytest.raises(InputError, match=r"0 backbones of the student; there are teacher\.backbone\."):
        read_backbone({n: t for n, t in whole.items() if n.startswith("teacher")}, "student")


@pytest.mark.parametrize("name", ["backbone_mlp", "backbone_swiglu_registers_chunked"])
def test_the_originals_weights_come_through_convert_and_compute_its_features(name, tmp_path, surgery):
    arrays, settings = load(name)
    raw = {n.removeprefix("state_dict/"): t for n, t in arrays.items() if n.startswith("state_dict/")}
    torch.save({"teacher": {f"backbone.{n}": t for n, t in raw.items()}}, tmp_path / "released.pth")
    out = tmp_path / "ours.safetensors"
    done = surgery("convert", tmp_path / "released.pth", "--to", "ours", "--out", out, "--num-heads", 2)
    assert (done.status, done.err) == (0, "")
    export = read_export(out)
    assert equal(export.state, section(arrays, "state_dict/"))
    here = (export.model.pos_embed_offset, export.model.pos_embed_antialias)
    assert here == (settings["interpolate_offset"], settings["interpolate_antialias"])
    for size in ("square_native_98", "wide_84x126"):
        golden = section(arrays, f"{size}/")
        tokens = features(export.state, export.model, golden["images"])
        assert relative_error(tokens[:, 0], golden["x_norm_clstoken"]) < 1e-5
        patches = tokens[:, 1 + export.model.num_register_tokens :]
        assert relative_error(patches, golden["x_norm_patchtokens"]) < 1e-5
