"""What `model.init_from` does not take: one line for each, and status 2."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.command_line import exit_status
from pretrain.export import write_export
from pretrain.export.transform import Order, convert
from pretrain.models.vit import VisionTransformer
from pretrain.start import load_backbone
from tests.export.released import STATE, TINY, Maker, of
from tests.surgery.backbones import random_state
from tests.surgery.test_broken_inputs import Harmful, saved, written


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
