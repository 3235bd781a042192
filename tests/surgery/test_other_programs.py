"""What this project writes, loaded by the programs it is for; and what they write, read here."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.export import read_export, write_export
from pretrain.export.examine import verify
from pretrain.export.transform import Order, convert
from pretrain.export.weights import read_weights
from tests.golden_files import relative_error
from tests.surgery.backbones import GIANT, MODELS, PLAIN, REGISTERS, features, images_for, random_state

pytestmark = pytest.mark.usefixtures("other_programs")
CASES = {**MODELS, "other-patch-and-channels": replace(PLAIN, patch_size=8, img_size=40, in_channels=4)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["huggingface", "timm"])
def test_the_real_models_compute_our_features(target, name, tmp_path):
    model = CASES[name]
    source = write_export(tmp_path / "a.safetensors", random_state(model), model, {})
    out = tmp_path / target
    convert(source, target, Order(out, allow_loss=True))
    found = verify(read_weights(source), read_weights(out))
    assert found.programs[0] == "pretrain" and found.programs[1].split()[0] == (
        "transformers" if target == "huggingface" else "timm"
    )
    assert found.difference < 1e-5


@pytest.mark.parametrize("name", ["mlp", "registers"])
def test_transformers_and_this_project_agree_at_other_sizes_where_the_settings_do(name, tmp_path):
    import transformers

    model = replace(CASES[name], pos_embed_offset=0.0)
    state = random_state(model)
    source = write_export(tmp_path / "a.safetensors", state, model, {})
    assert convert(source, "huggingface", Order(tmp_path / "hf")).changes == ()
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    images = images_for(model, (56, 98))
    with torch.no_grad():
        tokens = theirs(images).last_hidden_state
    assert relative_error(tokens, features(state, model, images)) < 1e-5


def test_timm_loads_the_folder_by_itself_and_a_grid_that_is_not_square(tmp_path):
    import timm

    model = replace(PLAIN, img_width=112, pos_embed_offset=0.0, pos_embed_antialias=True)
    state = random_state(model)
    source = write_export(tmp_path / "a.safetensors", state, model, {})
    convert(source, "timm", Order(tmp_path / "timm", allow_loss=True))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = images_for(model)
    with torch.no_grad():
        assert relative_error(theirs.forward_features(images), features(state, model, images)) < 1e-5


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("saved", ["folder", "state dict"])
def test_a_model_that_transformers_made_is_read(saved, swiglu, registers, tmp_path):
    """The folder has the names of released weights, the state dict those of the modules in memory."""
    import transformers

    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 70,
        "patch_size": 14,
        "use_swiglu_ffn": swiglu,
    }
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        theirs = transformers.Dinov2WithRegistersModel(config).eval()
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    source = tmp_path / "theirs"
    if saved == "folder":
        theirs.save_pretrained(source)
    else:
        torch.save(theirs.state_dict(), source)
    weights = read_weights(source)
    assert weights.changes == () and weights.model.num_register_tokens == registers
    images = images_for(weights.model, (70, 98) if saved == "folder" else None)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
    assert relative_error(features(weights.state, weights.model, images), expected) < 1e-5


@pytest.mark.parametrize("model", [PLAIN, REGISTERS, GIANT], ids=["plain", "registers", "giant"])
def test_a_model_that_timm_made_is_read(model, tmp_path):
    import timm

    from pretrain.export.model_configs import timm_architecture, timm_arguments

    theirs = timm.create_model(timm_architecture(model), **timm_arguments(model)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    weights = read_weights(tmp_path / "timm.pth")
    assert [change.what for change in weights.changes] == ["mask_token of zeros"]
    images = images_for(model)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    assert relative_error(features(weights.state, weights.model, images), expected) < 1e-5


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_timms_own_names_load_what_is_written_for_released_sizes(name, tmp_path):
    """The names that a user types fit too, without any of our arguments; by their shapes."""
    import timm

    arch, registers = ("vit_giant2", 4) if "giant" in name else ("vit_small", 0)
    model = replace(
        PLAIN,
        arch=arch,
        embed_dim=None,
        depth=None,
        num_heads=None,
        img_size=518,
        num_register_tokens=registers,
        ffn_layer="swiglu" if "giant" in name else "mlp",
    )
    from pretrain.export.model_configs import timm_architecture
    from pretrain.models.vit import VisionTransformer
    from pretrain.surgery.conversion import write_layout

    assert timm_architecture(model) == name
    with torch.device("meta"):
        ours = write_layout(VisionTransformer(model).state_dict(), model, "timm", 4)
        theirs = timm.create_model(name, pretrained=False).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_a_wrong_order_of_query_and_key_is_found_and_named(tmp_path, surgery):
    source = write_export(tmp_path / "a.safetensors", random_state(PLAIN), PLAIN, {})
    convert(source, "huggingface", Order(tmp_path / "hf"))
    path = tmp_path / "hf" / "model.safetensors"
    swap = {"query": "key", "key": "query"}
    named = load_file(path)
    wrong = {".".join(swap.get(part, part) for part in name.split(".")): t for name, t in named.items()}
    save_file(wrong, path, metadata={"format": "pt"})
    done = surgery("verify", source, tmp_path / "hf")
    assert done.status == 1 and done.err == ""
    assert "4 qkv tensors of B have A's thirds in the order k q v, as blocks.0.attn.qkv.weight" in done.out
    assert "not the same within a tolerance of 1e-05" in done.out


def test_a_folder_that_transformers_would_fill_with_random_weights_is_refused(tmp_path, surgery):
    source = write_export(tmp_path / "a.safetensors", random_state(PLAIN), PLAIN, {})
    out = tmp_path / "hf"
    convert(source, "huggingface", Order(out))
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    done = surgery("verify", source, out)
    assert done.status == 2 and done.err.count("\n") == 1
    assert f"{out}: transformers does not load it whole: " in done.err and "missing_keys" in done.err


def test_the_image_processor_is_loadable(tmp_path: Path):
    from transformers import AutoImageProcessor

    source = write_export(tmp_path / "a.safetensors", random_state(PLAIN), PLAIN, {})
    convert(source, "huggingface", Order(tmp_path / "hf"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.crop_size["height"] == 70
    assert read_export(source).model == PLAIN
