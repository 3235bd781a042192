"""The hook as a file of its own, in the models of transformers: what it computes, and what stays usual."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.export import write_export
from pretrain.export.transform import Order, convert
from pretrain.sinder.hook_file import hook_text
from pretrain.surgery.compare import backbone_features
from tests.golden_files import relative_error
from tests.surgery.backbones import MODELS, images_for, random_state

NEURONS = [[1, 40], [0, 3], [1, 2]]


def load_hook(path: Path, pairs):
    """The module that is written for neurons."""
    path.write_text(hook_text(pairs))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mlp", "swiglu", "registers", "swiglu-registers"])
def test_transformers_computes_what_this_project_does(name, tmp_path, other_programs):
    import transformers

    state, model, images = random_state(MODELS[name]), MODELS[name], images_for(MODELS[name])
    source, folder = write_export(tmp_path / "a.safetensors", state, model, {}), tmp_path / "hf"
    convert(source, "huggingface", Order(folder))
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    hook = load_hook(tmp_path / "hook.py", NEURONS)
    every = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        before = theirs(images, **every)
        hook.attach(theirs)
        after, as_tuple = theirs(images, **every), theirs(images, return_dict=False)
        hook.detach(theirs)
        assert torch.equal(theirs(images).last_hidden_state, before.last_hidden_state)
    ours = backbone_features(state, replace(model, register_neurons=NEURONS))(images)
    assert relative_error(after.last_hidden_state, ours) < 1e-5
    assert relative_error(before.last_hidden_state, ours) > 1e-3
    assert torch.equal(as_tuple[0], after.last_hidden_state)
    for kind in ("hidden_states", "attentions"):
        assert [x.shape for x in after[kind]] == [x.shape for x in before[kind]]


@pytest.mark.parametrize("name", ["mlp", "registers"])
def test_the_feature_maps_of_backbones_are_those_of_the_model(name, tmp_path, other_programs):
    import transformers

    model = MODELS[name]
    source = write_export(tmp_path / "a.safetensors", random_state(model), model, {})
    convert(source, "huggingface", Order(tmp_path / "hf"))
    kind = "Dinov2WithRegistersBackbone" if model.num_register_tokens else "Dinov2Backbone"
    theirs = getattr(transformers, kind).from_pretrained(str(tmp_path / "hf")).eval()
    load_hook(tmp_path / "hook.py", NEURONS).attach(theirs)
    images = images_for(model)
    with torch.no_grad():
        maps = theirs(images).feature_maps[-1]
    ours = backbone_features(random_state(model), replace(model, register_neurons=NEURONS))(images)
    assert relative_error(maps.flatten(2).mT, ours[:, 1 + model.num_register_tokens :]) < 1e-5


def test_the_file_is_valid_and_formatted(tmp_path):
    path = tmp_path / "hook.py"
    hook = load_hook(path, [[12, 7], *([17, unit] for unit in range(60)), [3, 1]])
    assert {3: [1], 12: [7], 17: list(range(60))} == hook.NEURONS
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--isolated", "--line-length", "110", path]
    assert subprocess.run(ruff, capture_output=True, check=False).returncode == 0


def test_other_models_are_refused_and_left_as_they_are(tmp_path, other_programs):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes))
    for pairs, part, words in (
        ([[2, 0]], model.dinov2, "this one has no block 2"),
        ([[1, 128]], model.dinov2, "block 1 here has no unit 128"),
        ([[1, 0]], model, "a Dinov2ForImageClassification is no DINOv2 model without a head"),
    ):
        with pytest.raises(ValueError, match=words):
            load_hook(tmp_path / "hook.py", pairs).attach(part)
    assert not model.dinov2.embeddings._forward_hooks
    hook = load_hook(tmp_path / "hook.py", [[1, 0]])
    hook.attach(model.dinov2)
    with pytest.raises(ValueError, match="the model has a test-time register already"):
        hook.attach(model.dinov2)
