"""What `model.init_from` takes: every layout of a released ViT-S."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.cli import main
from pretrain.config.load import load_config, save_config
from pretrain.export.fitting import fitted_backbone
from pretrain.start import build_branches, fill_weights
from tests.export.released import STATE, TINY, of, written_as
from tests.golden_files import relative_error
from tests.small import small_config
from tests.surgery.backbones import MODELS, PLAIN, equal, features, images_for, random_state
from tests.surgery.test_broken_inputs import saved

ROOT = Path(__file__).parents[2]
SHAPE = {"arch": "vit_small", "embed_dim": None, "depth": None, "num_heads": None}
RELEASED = replace(PLAIN, **SHAPE, img_size=518)
RUN = replace(RELEASED, img_size=112, layer_scale=1e-5)
FORMATS = {
    "ours": "(safetensors file, DINOv2): 175 of 175 tensors",
    "dinov2": "(file of torch.save, DINOv2): 175 of 175 tensors",
    "dinov2-chunked": "(file of torch.save, DINOv2, block chunks): 175 of 175 tensors",
    "huggingface": "(model folder, Hugging Face): 175 of 175 tensors",
    "timm": "(model folder, timm): 174 of 175 tensors",
}


@pytest.fixture(scope="module")
def released() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A ViT-S/14 of 518 px; images of 112 px, and its features of them."""
    state = random_state(RELEASED)
    state["mask_token"].zero_()  # timm has none
    images = images_for(RUN)
    return state, images, features(state, RELEASED, images)


@pytest.mark.parametrize("target", FORMATS)
def test_a_run_starts_from_every_layout(target, released, tmp_path, monkeypatch, capsys):
    state, images, expected = released
    path = written_as(tmp_path, target, state, RELEASED)
    monkeypatch.chdir(tmp_path)
    cfg = small_config(model=replace(RUN, init_from=str(path)))
    student, teacher, _ = build_branches(cfg, torch.device("cpu"), 4)
    fill_weights(cfg, student, teacher)
    with torch.no_grad():
        cls, _, patches = student.backbone([images])[0]
    assert student.backbone.pos_embed.shape == (1, 1 + 8 * 8, 384)
    assert relative_error(torch.cat([cls.unsqueeze(1), patches], dim=1), expected) < 1e-6
    assert all(map(torch.equal, student.state_dict().values(), teacher.state_dict().values()))
    first, *others = capsys.readouterr().out.splitlines()
    grid = "positions 37 x 37 -> 8 x 8 (offset 0.1, antialias false)"
    assert first == f"model.init_from: {path} {FORMATS[target]}; {grid}"
    added = "model.init_from: added: mask_token of zeros (timm weights without one)"
    assert others == ([added] if target == "timm" else [])


def config(shards: Path, folder: Path, path: Path, *overrides: str) -> str:
    """The path of a config that trains TINY from a file."""
    settings = [
        *(f"run.dir={folder / 'run'}", "run.steps=2", f"data.shards=[{shards}/train-*.tar]"),
        *(f"model.init_from={path}", "model.embed_dim=64", "model.num_heads=1", "model.patch_size=14"),
        *("model.img_size=28", "model.num_register_tokens=0", "model.ffn_layer=mlp"),
        *("data.global_crops.size=28", "data.local_crops.size=14", "mask.min_patches=1"),
        *("mask.ratio=[0.25,0.5]", "data.group_size=4", "optim.global_batch_size=4", "log.every=1"),
        *("optim.warmup_steps=0", "optim.freeze_backbone_steps=1", "engine.accumulation_steps=1"),
        *("log.tensorboard=false", "log.knn.train=[]", "log.knn.test=[]", *overrides),
    ]
    name = folder / "run.yaml"
    save_config(load_config(ROOT / "configs" / "debug_cpu.yaml", settings), name)
    return str(name)


def test_the_command_line_trains_from_a_hugging_face_folder_that_may_be_gone_later(shards, tmp_path, capsys):
    path, moved = of(TINY, "huggingface")(tmp_path), tmp_path / "moved"
    assert main([config(shards, tmp_path, path)]) == 0
    said = f"model.init_from: {path} (model folder, Hugging Face): 35 of 35 tensors; positions 5 x 5 -> 2 x 2"
    assert said in capsys.readouterr().out
    path.rename(moved)
    assert main([config(shards, tmp_path, path, "run.steps=3")]) == 0
    assert "model.init_from: " not in capsys.readouterr().out.replace("changed since", "")
    assert main([config(shards, tmp_path, path, f"run.dir={tmp_path / 'again'}")]) == 2
    assert capsys.readouterr().err == f"pretrain: model.init_from: {path}: no such file\n"


def test_of_a_training_checkpoint_the_teacher_is_taken_and_the_rest_is_said(tmp_path):
    other, heads = random_state(TINY, seed=1), {"mlp.0.weight": torch.ones(8, 64)}
    branches = {"student": other, "teacher": STATE}
    named = {
        f"{branch}.{part}.{name}": tensor
        for branch, state in branches.items()
        for part, tensors in (("backbone", state), ("dino_head", heads))
        for name, tensor in tensors.items()
    }
    fitted = fitted_backbone(saved(tmp_path / "a.pth", {"model": named}), TINY)
    assert equal(fitted.state, STATE)
    said = "\n".join(fitted.report)
    assert "block" not in said and "DINOv2 below model.teacher.backbone): 35 of 35 tensors" in said
    assert "left out: model.student" in said and "left out: model.teacher.dino_head" in said


@pytest.mark.parametrize("target", ["huggingface", "timm"])
@pytest.mark.parametrize("model", ["mlp", "registers"])
def test_what_a_layout_does_not_tell_is_of_the_training_or_the_program(target, model, tmp_path):
    theirs = MODELS[model]
    state = random_state(theirs)
    path, images = written_as(tmp_path, target, state, theirs), images_for(replace(theirs, img_size=42))
    program = (0.0, target == "timm" or model == "registers")
    for offset, antialias in {(theirs.pos_embed_offset, theirs.pos_embed_antialias), program}:
        there = replace(theirs, pos_embed_offset=offset, pos_embed_antialias=antialias)
        here = replace(there, img_size=42)
        found = features(fitted_backbone(path, here).state, here, images)
        assert relative_error(found, features(state, there, images)) < 1e-6
