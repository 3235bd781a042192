"""Realistic oddities that once went wrong: neighbours on the disk, configs that lie, numbers out of range."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import InputError
from pretrain.export import read_export, write_export
from pretrain.export.transform import Order, convert
from pretrain.export.weights import read_weights
from tests.surgery.backbones import GIANT, PLAIN, REGISTERS, equal, random_state

STATE = random_state(PLAIN)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_export(tmp_path / "a.safetensors", STATE, PLAIN, {})


@pytest.fixture
def hugging_face(source: Path, tmp_path: Path) -> Path:
    convert(source, "huggingface", Order(tmp_path / "hf"))
    return tmp_path / "hf"


def undescribed(folder: Path, **changes: object) -> Path:
    """A model folder as another program writes it, with a changed config."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def refused(done, words: str) -> None:
    assert done.status == 2 and done.err.count("\n") == 1 and words in done.err


def test_folders_beside_the_target_are_nobodys_to_remove(source, tmp_path, surgery):
    for name in ("model.old", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    for force in ((), ("--force",)):
        assert (
            surgery("convert", source, "--to", "huggingface", "--out", tmp_path / "model", *force).status == 0
        )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.safetensors", "a.json", "model", "model.old", "model.tmp"}
    assert (tmp_path / "model.old/precious.txt").read_text() == "mine"


def test_a_link_is_followed_and_a_dangling_one_counts_as_there(source, tmp_path, surgery):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    command = ("convert", source, "--to", "huggingface", "--out", tmp_path / "link")
    for _ in range(2):
        assert surgery(*command, "--force").status == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/config.json").exists()
    (tmp_path / "b.safetensors").symlink_to("nowhere")
    refused(surgery("convert", source, "--to", "ours", "--out", tmp_path / "b.safetensors"), "exists; choose")


def test_a_note_that_cannot_be_written_leaves_the_weights_alone(source, tmp_path, surgery):
    (tmp_path / "b.json").mkdir()
    command = ("convert", source, "--to", "ours", "--out", tmp_path / "b.safetensors", "--force")
    refused(surgery(*command), "b.json: is a folder, a file is to be written")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_note_of_another_file_says_nothing(source, tmp_path, surgery):
    torch.save(STATE, tmp_path / "vits.pth")
    out = tmp_path / "vits.safetensors"
    assert surgery("interpolate", tmp_path / "vits.pth", "--image-size", 56, "--out", out).status == 0
    again = read_weights(tmp_path / "vits.pth")
    assert again.model.img_size == 70 and again.about == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu"}, "config.json: hidden_act='relu'; only 'gelu' is supported"),
        ({"layer_norm_eps": 0.01}, "config.json: layer_norm_eps=0.01; only 1e-06 is supported"),
        ({"qkv_bias": False}, "config.json: qkv_bias=False"),
        ({"quantization_config": {"bits": 4}}, "config.json: quantization_config="),
        ({"num_attention_heads": "6"}, "config.json: num_attention_heads='6' is no number"),
        ({"num_attention_heads": -2}, "num_heads=-2 must be a number from 1 to"),
        ({"num_attention_heads": 7}, "7 heads do not divide width 384"),
        ({"model_type": ["dinov2"]}, "a Hugging Face model of type ['dinov2']"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_hugging_face_config_of_another_computation_is_refused(
    changes, words, hugging_face, surgery, tmp_path
):
    folder = undescribed(hugging_face, **changes)
    refused(surgery("convert", folder, "--to", "ours", "--out", tmp_path / "b.safetensors"), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "hf-hub:someone/code"}, "architecture='hf-hub:someone/code'; timm's vit_*_dinov2"),
        ({"architecture": None}, "architecture=None"),
        ({"model_args": {"act_layer": "relu"}}, "model_args.act_layer is not known here"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "model_args.checkpoint_path is not known here"),
        ({"model_args": {"num_heads": [1]}}, "model_args.num_heads=[1] is no number"),
        ({"model_args": "none"}, "model_args='none' is no JSON object"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_timm_config_of_another_computation_is_refused(changes, words, source, surgery, tmp_path):
    convert(source, "timm", Order(tmp_path / "timm", allow_loss=True))
    folder = undescribed(tmp_path / "timm", **changes)
    refused(surgery("convert", folder, "--to", "ours", "--out", tmp_path / "b.safetensors"), words)


@pytest.mark.parametrize("use_mask_token", [True, False])
def test_folders_without_a_mask_token_or_in_old_bins_are_read(use_mask_token, hugging_face):
    state = load_file(hugging_face / "model.safetensors")
    (hugging_face / "model.safetensors").unlink()
    if not use_mask_token:
        del state["embeddings.mask_token"]
    torch.save(state, hugging_face / "pytorch_model.bin")
    found = read_weights(hugging_face)
    assert [change.what for change in found.changes] == ([] if use_mask_token else ["mask_token of zeros"])
    assert torch.equal(found.state["blocks.1.attn.qkv.weight"], STATE["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("grid", "registers"), [((3, 3), 4), ((5, 5), 8), ((2, 2), 4), ((4, 4), 16), ((3, 7), 4)]
)
def test_registers_in_timm_are_told_from_patches(grid, registers, tmp_path):
    size = {"img_size": 14 * grid[0], "img_width": None if grid[0] == grid[1] else 14 * grid[1]}
    model = replace(REGISTERS, num_register_tokens=registers, **size)
    state = random_state(model)
    write_export(tmp_path / "a.safetensors", state, model, {})
    convert(tmp_path / "a.safetensors", "timm", Order(tmp_path / "timm", allow_loss=True))
    for folder in (tmp_path / "timm", undescribed(tmp_path / "timm")):
        found = read_weights(folder)
        assert found.model == model
        assert torch.equal(found.state["pos_embed"][:, 1:], state["pos_embed"][:, 1:])


def test_dinov2_weights_without_a_mask_token_are_no_timm_model():
    for model in (GIANT, REGISTERS):
        from pretrain.surgery.conversion import read_backbone

        state = random_state(model)
        found = read_backbone({name: tensor for name, tensor in state.items() if name != "mask_token"})
        assert found.form.target == "dinov2" and torch.equal(found.state["pos_embed"], state["pos_embed"])
        assert torch.equal(found.state["register_tokens"], state["register_tokens"])


@pytest.mark.parametrize("ratio", [2.0, 3.0, 5.0])
def test_whole_ratios_of_swiglu_stay_whole(ratio, tmp_path):
    model = replace(GIANT, ffn_ratio=ratio)
    write_export(tmp_path / "a.safetensors", random_state(model), model, {})
    convert(tmp_path / "a.safetensors", "huggingface", Order(tmp_path / "hf"))
    convert(undescribed(tmp_path / "hf"), "huggingface", Order(tmp_path / "again"))
    assert json.loads((tmp_path / "again/config.json").read_text())["mlp_ratio"] == ratio


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("patch_embed.proj.weight", torch.ones(384, 588), "(384, 588): not a tensor of 4 dimensions"),
        ("pos_embed", torch.ones(26), "pos_embed is (26,): not a tensor of 3 dimensions"),
        ("pos_embed", torch.ones(1, 0, 384), "pos_embed is (1, 0, 384): not a tensor of 3 dimensions"),
        ("pos_embed", torch.ones(1, 1, 384), "img_size=0 must be a number from 1"),
        ("register_tokens", torch.ones(384), "register_tokens is (384,): not a tensor of 3 dimensions"),
        ("blocks.0.mlp.fc1.weight", torch.tensor(1.0), "fc1.weight is (): not a tensor of 2 dimensions"),
        ("blocks.20000.norm1.weight", torch.ones(384), "1 tensors: blocks.20000.norm1.weight"),
        ("mask_token", torch.ones(1, 384).to_sparse(), "mask_token is no plain tensor"),
        ("mask_token", torch.ones(1, device="meta"), "mask_token is no plain tensor"),
        ("mask_token", torch.ones(1).expand(10**6, 10**6), "mask_token is no plain tensor"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_tensors_of_wrong_ranks_and_kinds_are_refused(name, tensor, words, tmp_path, surgery):
    torch.save({**STATE, name: tensor}, tmp_path / "a.pth")
    refused(
        surgery("convert", tmp_path / "a.pth", "--to", "ours", "--out", tmp_path / "b.safetensors"), words
    )


@pytest.mark.parametrize(
    "section", ["patch_size: 0", "img_size: -42", "ffn_ratio: .nan", "embed_dim: 4611686018427387904"]
)
def test_an_impossible_model_section_is_refused(section, source, surgery, tmp_path):
    key, value = section.split(": ")
    text = json.dumps({"format": "pretrain-export-1", "model": {key: value}, "about": {}})
    save_file(STATE, tmp_path / "b.safetensors", metadata={"format": "pt", "pretrain": text})
    refused(
        surgery("convert", tmp_path / "b.safetensors", "--to", "dinov2", "--out", tmp_path / "c.pth"), "model"
    )


@pytest.mark.parametrize("about", ["null", '"x"', "[1]", '{"provenance": null}', "[" * 5000 + "]" * 5000])
def test_a_damaged_description_is_refused(about, tmp_path, surgery):
    text = f'{{"format": "pretrain-export-1", "model": {{}}, "about": {about}}}'
    save_file(STATE, tmp_path / "b.safetensors", metadata={"format": "pt", "pretrain": text})
    command = ("convert", tmp_path / "b.safetensors", "--to", "dinov2", "--out", tmp_path / "c.pth")
    refused(surgery(*command), "the description of its model is damaged")


@pytest.mark.parametrize(
    "weight_map", ["null", "[]", '"x"', '{"a": 1}', '{"a": null}', '{"a": "../a.safetensors"}']
)
def test_an_index_that_is_none_is_refused(weight_map, hugging_face, surgery, tmp_path):
    (hugging_face / "model.safetensors").unlink()
    (hugging_face / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    done = surgery("convert", hugging_face, "--to", "ours", "--out", tmp_path / "b.safetensors")
    refused(done, "model.safetensors.index.json: ")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("resize-patch A --patch-size 2000 --out B.pth", "--patch-size: 2000 must be from 1 to 256"),
        ("interpolate A --image-size 14000000 --out B.pth", "--image-size: 14000000 px must be from"),
        ("interpolate A --image-size 28 --offset nan --out B.pth", "the position offset nan must be from 0"),
        ("interpolate A --image-size 28 --offset -9 --out B.pth", "the position offset -9.0 must be from 0"),
        ("interpolate A --image-size 28x56 --out B.pth", "has square position grids only, this one is 2 x 4"),
        ("channels A --to 10000000000 --out B.pth", "channels must be from 1 to 1024"),
        ("add-registers A 100000000000 --out B.pth", "must be from 1 to 1024"),
        ("convert A --to ours --num-heads 0 --out B.safetensors", "num_heads=0 must be a number from 1"),
        ("convert A --to ours --num-heads 7 --out B.safetensors", "7 heads do not divide width 384"),
        ("convert A --to ours --chunks 2 --out B.safetensors", "--chunks: only for --to dinov2-chunked"),
        ("convert A --to timm --split-swiglu --out B", "--split-swiglu: only for --to dinov2"),
        ("diff A A --tolerance nan", "'nan' is not a number of 0 or more"),
        ("verify A A --tolerance -1", "'-1' is not a number of 0 or more"),
        ("average A A --weights 0,0 --out B.pth", "--weights: all must be 0 or more, and one above 0"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(command, words, source, tmp_path, surgery):
    places = {
        "A": source,
        "B": tmp_path / "b",
        "B.pth": tmp_path / "b.pth",
        "B.safetensors": tmp_path / "b.safetensors",
    }
    refused(surgery(*(places.get(word, word) for word in command.split())), words)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.json"}


def test_inspect_describes_what_no_other_verb_takes(tmp_path, surgery):
    wild = {name: tensor * 1e19 if tensor.ndim == 2 else tensor for name, tensor in STATE.items()}
    small = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in STATE.items()}
    for state in (wild, small):
        save_file(state, tmp_path / "a.safetensors")
        done = surgery("inspect", tmp_path / "a.safetensors")
        assert done.status == 0 and "blocks.1.mlp.fc2.weight" in done.out
    assert "float8_e4m3fn" in done.out


def test_an_average_says_what_was_done_to_each_file(source, tmp_path, surgery):
    other = write_export(tmp_path / "b.safetensors", STATE, PLAIN, {"step": 9, "branch": "student"})
    first = write_export(tmp_path / "c.safetensors", STATE, PLAIN, {"step": 9, "branch": "teacher"})
    convert(other, "timm", Order(tmp_path / "timm", allow_loss=True))
    save_file(load_file(tmp_path / "timm/model.safetensors"), tmp_path / "d.safetensors")
    out = tmp_path / "out.safetensors"
    command = (
        "average",
        first,
        tmp_path / "d.safetensors",
        "--offset",
        0.1,
        "--antialias",
        "false",
        "--out",
        out,
    )
    done = surgery(*command)
    assert done.status == 0 and "d.safetensors: mask_token of zeros" in done.out
    assert surgery("average", first, other, "--out", out, "--force").status == 0
    about = read_export(out).about
    assert about["step"] == 9 and "branch" not in about
    assert [s["about"]["branch"] for s in about["provenance"][0]["sources"]] == ["teacher", "student"]


def test_huge_weights_and_long_averages_are_exact(source, tmp_path, surgery):
    out = tmp_path / "out.safetensors"
    assert surgery("average", source, source, "--weights", "1e308,1e308", "--out", out).status == 0
    assert equal(read_export(out).state, STATE)
    assert surgery("average", *[source] * 40, "--ema", 1e-9, "--out", out, "--force").status == 0
    assert equal(read_export(out).state, STATE)


def test_values_that_vanish_in_a_cast_are_counted(tmp_path, surgery):
    state = {name: tensor * 1e-9 if name.endswith("gamma") else tensor for name, tensor in STATE.items()}
    source = write_export(tmp_path / "a.safetensors", state, PLAIN, {})
    done = surgery("cast", source, "--to", "float16", "--out", tmp_path / "b.safetensors")
    assert done.status == 0 and "values became 0" in done.out


def test_half_precision_says_that_a_folded_position_is_rounded(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in random_state(REGISTERS).items()}
    source = write_export(tmp_path / "a.safetensors", state, REGISTERS, {})
    with pytest.raises(InputError, match="digits of that sum"):
        convert(source, "timm", Order(tmp_path / "timm"))


def test_other_copies_of_a_backbone_are_named(tmp_path, surgery):
    both = {
        "model": STATE,
        "model_ema": random_state(PLAIN, 7),
        "optimizer_states": {"0": {"m": torch.ones(2)}},
    }
    torch.save(both, tmp_path / "a.pth")
    out = tmp_path / "b.safetensors"
    refused(
        surgery("convert", tmp_path / "a.pth", "--to", "ours", "--out", out), "there are model., model_ema."
    )
    done = surgery(
        "convert", tmp_path / "a.pth", "--branch", "model_ema", "--to", "ours", "--out", out, "--allow-loss"
    )
    assert done.status == 0 and equal(read_export(out).state, both["model_ema"])
    assert "optimizer_states" in done.out


def test_verify_refuses_a_config_that_its_program_refuses(hugging_face, source, surgery, other_programs):
    undescribed(hugging_face, image_size="big")
    refused(surgery("verify", source, hugging_face), "transformers does not load it")
