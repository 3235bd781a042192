"""What people feed to a converter, and the one line that each gets. Nothing is ever written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.export import write_export
from pretrain.export.transform import Order, convert
from tests.surgery.backbones import PLAIN, random_state

STATE = random_state(PLAIN)
Maker = Callable[[Path], Path]


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm",)


def saved(path: Path, contents: object) -> Path:
    torch.save(contents, path)
    return path


def written(path: Path, text: bytes) -> Path:
    path.write_bytes(text)
    return path


def truncated(folder: Path) -> Path:
    path = saved(folder / "weights.pth", STATE)
    return written(path, path.read_bytes()[:-1000])


def truncated_safetensors(folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file(STATE, path)
    return written(path, path.read_bytes()[:-1000])


def resnet(folder: Path) -> Path:
    names = {
        "conv1.weight": torch.ones(4, 3, 7, 7),
        "bn1.weight": torch.ones(4),
        "fc.weight": torch.ones(9, 4),
    }
    return saved(folder / "resnet50.pth", names)


def half_the_names(folder: Path) -> Path:
    kept = {name: tensor for name, tensor in STATE.items() if not name.startswith("blocks.1.")}
    kept["blocks.1.norm1.weight"] = STATE["blocks.1.norm1.weight"]
    return saved(folder / "weights.pth", kept)


def extra_names(folder: Path) -> Path:
    return saved(
        folder / "weights.pth", {**STATE, "head.weight": torch.ones(9, 384), "head.bias": torch.ones(9)}
    )


def with_nan(folder: Path) -> Path:
    broken = {**STATE, "blocks.1.attn.qkv.weight": STATE["blocks.1.attn.qkv.weight"].clone()}
    broken["blocks.1.attn.qkv.weight"][5, 7] = torch.nan
    return saved(folder / "weights.pth", broken)


def whole_model(folder: Path) -> Path:
    return saved(folder / "model.pth", torch.nn.Sequential(torch.nn.Linear(2, 2)))


def fp8(folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file({n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in STATE.items()}, path)
    return path


def other_shapes(folder: Path) -> Path:
    return saved(folder / "weights.pth", {**STATE, "blocks.1.mlp.fc1.weight": torch.ones(1536, 300)})


def other_language_model(folder: Path) -> Path:
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps({"model_type": "vit"}))
    save_file(STATE, folder / "hf/model.safetensors")
    return folder / "hf"


def empty_model_folder(folder: Path) -> Path:
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps({"model_type": "dinov2"}))
    return folder / "hf"


def dinov3(folder: Path) -> Path:
    rest = {name: tensor for name, tensor in STATE.items() if name != "pos_embed"}
    return saved(folder / "dinov3.pth", {**rest, "rope_embed.periods": torch.ones(16)})


def missing_shard(folder: Path) -> Path:
    source = write_export(folder / "a.safetensors", STATE, PLAIN, {})
    path = folder / "hf"
    convert(source, "huggingface", Order(path))
    named = load_file(path / "model.safetensors")
    first = dict(list(named.items())[::2])
    save_file(first, path / "model-00001-of-00002.safetensors")
    index = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in named}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "model.safetensors").unlink()
    return path


def description_of_another(folder: Path) -> Path:
    return write_export(folder / "a.pth", STATE, replace(PLAIN, patch_size=16, img_size=80), {})


def odd_width(folder: Path) -> Path:
    narrow = replace(PLAIN, embed_dim=24, num_heads=2)
    return saved(folder / "weights.pth", random_state(narrow))


CASES: dict[str, tuple[Maker, str]] = {
    "no such file": (lambda folder: folder / "none.pth", "no such file"),
    "an empty file": (lambda folder: written(folder / "a.pth", b""), "is empty"),
    "a truncated .pth": (truncated, "cut short, damaged or no state dict (File is not a zip file"),
    "a truncated .safetensors": (truncated_safetensors, "not a complete safetensors file (Error while"),
    "a web page saved as .pth": (
        lambda folder: written(folder / "a.pth", b"<!DOCTYPE html><html>404 Not Found</html>"),
        "a web page, not weights: download it again and check the address",
    ),
    "a Git LFS pointer": (
        lambda folder: written(folder / "a.safetensors", b"version https://git-lfs.github.com/spec/v1"),
        "a Git LFS pointer, not weights: fetch it with git lfs pull",
    ),
    "a picture": (
        lambda folder: written(folder / "a.pth", b"\x89PNG\r\n\x1a\n" + bytes(100)),
        "not a complete safetensors file (and not one of torch.save)",
    ),
    "a pickle that runs a command": (
        lambda folder: saved(folder / "a.pth", {"model": Harmful()}),
        "a pickle that wants to run posix.system: refused. If you trust it, save its tensors alone",
    ),
    "a plain pickle that runs a command": (
        lambda folder: written(folder / "a.pth", pickle.dumps(Harmful())),
        "a pickle that torch.save did not write: refused, it could run code",
    ),
    "a whole pickled model": (
        whole_model,
        "holds torch.nn.modules.container.Sequential objects instead of tensors; save a state dict",
    ),
    "no tensors": (lambda folder: saved(folder / "a.pth", {"step": 3}), "holds no tensors, but a dict"),
    "another architecture": (
        resnet,
        "no vision transformer that this tool knows among 3 tensors (conv1.weight, bn1.weight, fc.weight)",
    ),
    "a DINOv3 backbone: rotary instead of learned positions are not supported": (dinov3, "a DINOv3 backbone"),
    "half of the names": (
        half_the_names,
        "of the model's 35 tensors: 13 missing (blocks.1.norm1.bias, blocks.1.attn.qkv.weight, ",
    ),
    "names too many": (
        extra_names,
        "would be lost: 2 tensors: head.weight, head.bias (no part of a backbone). If that is meant: -",
    ),
    "a tensor of another shape": (
        other_shapes,
        "1 of another shape (blocks.1.mlp.fc1.weight (1536, 300) instead of (1536, 384))",
    ),
    "NaN": (with_nan, "blocks.1.attn.qkv.weight holds NaN or Inf; `inspect` lists all such values"),
    "fp8": (fp8, "is float8_e4m3fn; write it as float32, bfloat16 or float16 where it was made"),
    "a width that tells no heads": (odd_width, "width 24 is no multiple of 64; give it with --num-"),
    "a folder of pictures": (
        lambda folder: folder,
        "a folder that holds no weights: neither a",
    ),
    "a model folder without weights": (empty_model_folder, "has a config.json and no weights"),
    "another model of Hugging Face": (other_language_model, "a Hugging Face model of type 'vit'; dinov2 and"),
    "a missing shard": (missing_shard, "model-00002-of-00002.safetensors: no such file"),
    "a .json of another model": (description_of_another, "of another shape (patch_embed.proj.weight"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_gets_one_line_and_status_2_and_nothing_is_written(name, tmp_path, surgery, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    monkeypatch.chdir(tmp_path)
    make, words = CASES[name]
    source, out = make(folder), tmp_path / "out.safetensors"
    done = surgery("convert", source, "--to", "ours", "--out", out)
    assert done.status == 2 and done.out == ""
    assert done.err.startswith(f"surgery.py: {source}") and done.err.count("\n") == 1
    assert words in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]  # no file `harm` either


WRONG_COMMANDS = {
    "convert A --to ours --out B.pth": "--to ours writes a .safetensors file; name it so",
    "convert A --to dinov2 --out B.safetensors": "--to dinov2 writes a .pth file; name it so",
    "convert A --to onnx --out B": "argument --to: invalid choice: 'onnx'",
    "convert A --to ours --out A": "A.safetensors: exists; choose another name",
    "convert A --to timm --out . --force": "holds other things than a model; --force replaces model folders",
    "convert A --to dinov2-chunked --chunks 0 --out B.pth": "--chunks: 0 must be between 1 and the 2 blocks",
    "interpolate A --image-size 5z18 --out B.pth": "'5z18' is not a size like 518 or 224x448",
    "interpolate A --image-size 518 --out B.bin": "an export is named *.safetensors or *.pth",
    "cast A --to float16 --out B.pth --grid 3": "1 of another shape (pos_embed (1, 26, 384)",
    "extract student A --out B.pth": "0 backbones of the student; there are -",
    "consolidate A --out B.safetensors": "is not a folder; consolidate takes a sharded checkpoint",
    "consolidate A --branch student --out B.safetensors": "unrecognized arguments: --branch student",
    "convert A --to timm --out A --force": "is a file, a folder is to be written; choose another name",
    "convert A --to dinov2 --grid 0x5 --out B.pth": "'0x5' is not a size like 518 or 224x448",
    "diff A A --tolerance small": "'small' is not a number of 0 or more",
    "average --out B.pth": "the following arguments are required: FILE",
    "melt A": "invalid choice: 'melt'",
    "diff A": "the following arguments are required: B",
    "": "the following arguments are required: VERB",
}


@pytest.mark.parametrize("command", WRONG_COMMANDS)
def test_a_wrong_command_line_is_one_line(command, tmp_path, surgery, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_export(tmp_path / "A.safetensors", STATE, PLAIN, {})
    before = sorted(tmp_path.iterdir())
    done = surgery(*("A.safetensors" if word == "A" else word for word in command.split()))
    assert done.status == 2 and WRONG_COMMANDS[command] in done.err and done.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_grid_that_is_not_square_goes_only_where_it_is_held(tmp_path, surgery):
    wide = replace(PLAIN, img_width=98)
    source = write_export(tmp_path / "a.safetensors", random_state(wide), wide, {})
    for target, name in (("dinov2", "b.pth"), ("dinov2-chunked", "b.pth"), ("huggingface", "hf")):
        done = surgery("convert", source, "--to", target, "--out", tmp_path / name)
        assert done.status == 2 and "has square position grids only, this one is 5 x 7" in done.err
    narrow = replace(PLAIN, ffn_ratio=2.5)
    source = write_export(tmp_path / "c.safetensors", random_state(narrow), narrow, {})
    done = surgery("convert", source, "--to", "huggingface", "--out", tmp_path / "hf", "--allow-loss")
    assert done.status == 2 and "has whole feed-forward ratios only, this model's is 2.5" in done.err


def test_a_full_disk_leaves_what_was_there(tmp_path, surgery, monkeypatch):
    source = write_export(tmp_path / "a.safetensors", STATE, PLAIN, {})
    targets = (("ours", "b.safetensors"), ("dinov2", "c.pth"), ("huggingface", "hf"), ("timm", "timm"))
    for target, name in targets:
        out = tmp_path / name
        assert surgery("convert", source, "--to", target, "--out", out, "--allow-loss").status == 0
        before = {p: p.read_bytes() for p in ([out] if out.is_file() else out.iterdir())}

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            command = ("convert", source, "--to", target, "--out", out, "--allow-loss", "--force")
            done = surgery(*command)
        assert done.status == 2 and "No space left on device" in done.err
        assert {p: p.read_bytes() for p in ([out] if out.is_file() else out.iterdir())} == before
        assert not list(tmp_path.glob("*.tmp"))


def test_force_replaces_a_model_folder_whole(tmp_path, surgery):
    source = write_export(tmp_path / "a.safetensors", STATE, PLAIN, {})
    out = tmp_path / "model"
    assert surgery("convert", source, "--to", "huggingface", "--out", out).status == 0
    assert surgery("convert", source, "--to", "timm", "--out", out, "--allow-loss").status == 2
    assert surgery("convert", source, "--to", "timm", "--out", out, "--allow-loss", "--force").status == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    (out / "notes.txt").write_text("mine")
    done = surgery("convert", source, "--to", "timm", "--out", out, "--allow-loss", "--force")
    assert done.status == 2 and "holds other things than a model" in done.err
    shutil.rmtree(out)
