"""What `model.init_from` takes: every layout of a released ViT-S, and one line for each that does not fit."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.cli import main
from pretrain.command_line import exit_status
from pretrain.config.load import load_config, save_config
from pretrain.config.schema import ModelConfig
from pretrain.export import write_export
from pretrain.export.fitting import fitted_backbone
from pretrain.export.transform import Order, convert
from pretrain.models.vit import VisionTransformer
from pretrain.start import build_branches, fill_weights, load_backbone
from tests.golden_files import relative_error
from tests.small import small_config
from tests.surgery.backbones import MODELS, PLAIN, equal, features, images_for, random_state
from tests.surgery.test_broken_inputs import Harmful, saved, written

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
TINY = replace(PLAIN, embed_dim=64, num_heads=1)
STATE = random_state(TINY)
Maker = Callable[[Path], Path]


def without_description(path: Path) -> Path:
    """As other programs write it."""
    weights = path / "model.safetensors"
    if path.is_dir():
        save_file(load_file(weights), weights, metadata={"format": "pt"})
    elif path.suffix == ".pth":
        path.with_suffix(".json").unlink()
    return path


def written_as(folder: Path, target: str, state: dict[str, torch.Tensor], model: ModelConfig) -> Path:
    ours = write_export(folder / "ours.safetensors", state, model, {})
    if target == "ours":
        return ours
    path = folder / (f"{target}.pth" if target.startswith("dinov2") else target)
    convert(ours, target, Order(path, allow_loss=True))
    return without_description(path)


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


def of(model: ModelConfig, target: str = "dinov2") -> Maker:
    return lambda folder: written_as(folder, target, random_state(model), model)


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


def some(*names: str) -> Maker:
    return lambda folder: saved(folder / "a.pth", {name: STATE[name] for name in names})


def described(folder: Path) -> Path:
    """An export with two tensors (and a mask token, which is given to what has none)."""
    few = {name: STATE[name] for name in ("cls_token", "patch_embed.proj.weight")}
    return write_export(folder / "a.safetensors", few, TINY, {})


def described_registers(folder: Path) -> Path:
    """A folder of Hugging Face that we wrote: its description says more than the layout does."""
    model = replace(TINY, num_register_tokens=4)
    ours = write_export(folder / "ours.safetensors", random_state(model), model, {})
    convert(ours, "huggingface", Order(folder / "hf"))
    return folder / "hf"


def head(folder: Path) -> Path:
    names = {"dino_head.mlp.0.weight": torch.ones(8, 64), "dino_head.last_layer.weight_v": torch.ones(9, 8)}
    return saved(folder / "head.pth", names)


def truncated(folder: Path) -> Path:
    path = saved(folder / "a.pth", STATE)
    return written(path, path.read_bytes()[:-1000])


def other_program(folder: Path) -> Path:
    path = of(TINY, "huggingface")(folder)
    facts = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**facts, "model_type": "vit"}))
    return path


WRONG: dict[str, tuple[Maker, dict[str, object], str]] = {
    "two tensors": (
        some("patch_embed.proj.weight", "pos_embed"),
        {},
        "blocks.0.mlp.fc1.weight is missing; is the file complete?",
    ),
    "two tensors of an export": (described, {}, "of the model's 35 tensors: 32 missing (pos_embed, "),
    "another width": (
        of(replace(TINY, embed_dim=128, num_heads=2)),
        {},
        "model.embed_dim is 64 here and 128 there, model.num_heads is 1 here and 2 there; "
        "set model.embed_dim=128 model.num_heads=2",
    ),
    "another depth": (
        of(TINY),
        {"depth": 3},
        "holds another model: model.depth is 3 here and 2 there; set model.depth=2",
    ),
    "a ViT-S in place of a ViT-B": (
        of(TINY),
        {"arch": "vit_base", "embed_dim": None, "depth": None, "num_heads": None},
        "; set model.arch=custom model.embed_dim=64 model.depth=2 model.num_heads=1",
    ),
    "a head": (head, {}, "no vision transformer that this tool knows among 2 tensors (dino_head.mlp.0.wei"),
    "another feed-forward layer": (
        of(replace(TINY, ffn_layer="swiglu")),
        {},
        "holds another model: model.ffn_layer is mlp here and swiglu there; set model.ffn_layer=swiglu",
    ),
    "another feed-forward width": (
        of(replace(TINY, ffn_ratio=2.0)),
        {},
        "holds another model: model.ffn_ratio is 4 here and 2 there; set model.ffn_ratio=2",
    ),
    "no LayerScale": (
        of(replace(TINY, layer_scale=None)),
        {},
        "model.layer_scale is 1e-05 here and null there; set model.layer_scale=null",
    ),
    "LayerScale too many": (
        of(TINY),
        {"layer_scale": None},
        "model.layer_scale is null here and not null there; set model.layer_scale=1.0",
    ),
    "other heads": (
        of(TINY, "huggingface"),
        {"num_heads": 4},
        "model.num_heads is 4 here and 1 there; set model.num_heads=1",
    ),
    "a damaged file": (truncated, {}, "cut short, damaged or no state dict"),
    "a pickle that runs code": (
        lambda folder: saved(folder / "a.pth", {"model": Harmful()}),
        {},
        "a pickle that wants to run posix.system: refused",
    ),
    "a plain pickle that runs code": (
        lambda folder: written(folder / "a.pth", pickle.dumps(Harmful())),
        {},
        "a pickle that torch.save did not write: refused, it could run code",
    ),
    "a text": (
        lambda folder: written(folder / "a.pth", b"weights will follow"),
        {},
        "not a complete safetensors file (and not one of torch.save)",
    ),
    "no such file": (lambda folder: folder / "none.pth", {}, "none.pth: no such file"),
    "another model of Hugging Face": (other_program, {}, "a Hugging Face model of type 'vit'; dinov2 and"),
    "registers too many": (
        of(replace(TINY, num_register_tokens=4, pos_embed_offset=0.0, pos_embed_antialias=True)),
        {"pos_embed_offset": 0, "pos_embed_antialias": True},
        "model.num_register_tokens is 0 here and 4 there; set model.num_register_tokens=4, or make a file "
        "that fits: python tools/surgery.py drop-registers {} --keep 0 --out NEW.safetensors",
    ),
    "registers too few": (
        of(TINY),
        {"num_register_tokens": 4},
        "or make a file that fits: python tools/surgery.py add-registers {} 4 --out NEW.safetensors",
    ),
    "another patch size": (
        of(replace(TINY, patch_size=16, img_size=80)),
        {},
        "or make a file that fits: python tools/surgery.py resize-patch {} --patch-size 14 --out NEW.saf",
    ),
    "grey images": (
        of(replace(TINY, in_channels=1)),
        {},
        "or make a file that fits: python tools/surgery.py channels {} --to 3 --out NEW.safetensors",
    ),
    "another interpolation": (
        of(TINY),
        {"pos_embed_antialias": True, "pos_embed_offset": 0},
        "model.pos_embed_offset is 0 here and 0.1 there, model.pos_embed_antialias is true here and false "
        "there; set model.pos_embed_offset=0.1 model.pos_embed_antialias=false",
    ),
    "an interpolation that is described": (
        described_registers,
        {"num_register_tokens": 4, "pos_embed_offset": 0.0, "pos_embed_antialias": True},
        "holds another model: model.pos_embed_offset is 0 here and 0.1 there, model.pos_embed_antialias is",
    ),
    "a width that tells no heads": (
        of(replace(TINY, embed_dim=24, num_heads=2)),
        {},
        "give it with --num-heads; python tools/surgery.py convert has such options",
    ),
    "names too many": (
        lambda folder: saved(folder / "a.pth", {**STATE, "blocks.1.attn.q_norm.weight": torch.ones(64)}),
        {},
        "also holds 1 tensors: blocks.1.attn.q_norm.weight (no part of a backbone); if they change nothing, "
        "make a file without them: python tools/surgery.py convert {} --to ours --allow-loss --out NEW.s",
    ),
    "NaN": (
        lambda folder: saved(folder / "a.pth", {**STATE, "norm.bias": torch.full((64,), torch.nan)}),
        {},
        "norm.bias holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line_and_status_2(name, tmp_path, capsys, monkeypatch):
    make, changed, words = WRONG[name]
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    with torch.device("meta"):  # nothing may be filled
        backbone = VisionTransformer(replace(TINY, **{"layer_scale": 1e-5, **changed}))
    assert exit_status("pretrain", lambda: load_backbone(backbone, path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pretrain: model.init_from: {path}") and words.format(path) in line
    assert not (tmp_path / "harm").exists()


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
