import json
from dataclasses import replace

import pytest
import torch

from pretrain.config.schema import ModelConfig
from pretrain.export import write_export
from pretrain.export.examine import diff, inspect
from pretrain.export.weights import read_weights
from pretrain.surgery.inspection import inspect_tensor, spectral_norm, suspicions
from tests.surgery.backbones import GIANT, MODELS, PLAIN, REGISTERS, random_state


@pytest.fixture
def pair(tmp_path):
    """Writes two exports, of one state and of a changed copy."""

    def write(change=None, model: ModelConfig = PLAIN, other: ModelConfig | None = None):
        state = random_state(model)
        changed = {name: tensor.clone() for name, tensor in (random_state(other or model)).items()}
        if change:
            change(changed)
        paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        for path, weights, section in zip(paths, (state, changed), (model, other or model), strict=True):
            write_export(path, weights, section, {})
        return paths

    return write


def test_equal_weights_do_not_differ(pair, surgery):
    done = surgery("diff", *pair())
    assert done.status == 0 and "0 of 35 tensors differ; features by 0.00e+00" in done.out


def test_ratios_of_one_width_are_one_architecture(tmp_path):
    """Weights alone tell the width of the feed-forward layer; 8/3 and 341/128 both give 341."""
    model = replace(REGISTERS, ffn_ratio=8 / 3)
    state = random_state(model)
    described = read_weights(write_export(tmp_path / "a.safetensors", state, model, {}))
    torch.save(state, tmp_path / "b.pth")
    inferred = read_weights(tmp_path / "b.pth")
    assert inferred.model.ffn_ratio != model.ffn_ratio
    assert not diff(described, inferred).beyond(0.0)
    other = replace(model, ffn_ratio=2.0)
    narrower = read_weights(write_export(tmp_path / "c.safetensors", random_state(other), other, {}))
    assert diff(described, narrower).architecture == ["ffn_hidden_dim: 341 and 256"]


def test_differences_are_measured_where_they_are(pair, surgery):
    def change(state):
        state["blocks.1.mlp.fc2.weight"].mul_(1.01)
        state["norm.bias"].neg_()

    paths = pair(change)
    found = diff(*map(read_weights, paths))
    rows = {row.name: row for row in found.tensors if row.largest}
    assert rows.keys() == {"blocks.1.mlp.fc2.weight", "norm.bias"}
    assert rows["blocks.1.mlp.fc2.weight"].relative == pytest.approx(0.01, rel=1e-4)
    assert rows["blocks.1.mlp.fc2.weight"].cosine == pytest.approx(1.0)
    assert rows["norm.bias"].relative == pytest.approx(2.0) and rows["norm.bias"].cosine == pytest.approx(
        -1.0
    )
    assert found.features is not None and found.features > 1e-3
    for tolerance, status in ((1e-4, 1), (10.0, 0)):
        done = surgery("diff", *paths, "--tolerance", tolerance)
        assert done.status == status and done.out.index("norm.bias") < done.out.index(
            "blocks.1.mlp.fc2.weight"
        )
    document = json.loads(surgery("diff", *paths, "--json").out)
    assert document["differ"] is True and len(document["tensors"]) == 35


def test_another_function_of_the_same_weights_is_a_difference(pair, surgery):
    done = surgery("diff", *pair(other=replace(PLAIN, num_heads=3)))
    assert done.status == 1 and "architecture: num_heads: 6 and 3" in done.out
    assert "0 of 35 tensors differ; features by 0.00e+00" not in done.out


def test_other_architectures_are_said_and_not_compared(pair, surgery):
    done = surgery("diff", *pair(other=replace(REGISTERS, depth=3)))
    assert done.status == 1
    assert "architecture: depth: 2 and 3" in done.out and "nothing to compare" in done.out


def test_thirds_of_qkv_in_another_order_are_named(pair, surgery):
    def change(state):
        q, k, v = state["blocks.0.attn.qkv.weight"].chunk(3)
        state["blocks.0.attn.qkv.weight"] = torch.cat([v, q, k])

    paths = pair(change)
    for verb in ("diff", "verify"):
        done = surgery(verb, *paths)
        assert done.status == 1
        assert (
            "1 qkv tensors of B have A's thirds in the order v q k, as blocks.0.attn.qkv.weight" in done.out
        )


def test_nan_differs_from_everything(pair, surgery):
    paths = pair(lambda state: state["norm.weight"].fill_(float("nan")))
    done = surgery("diff", *paths, "--tolerance", 1e9)
    assert done.status == 2 and "norm.weight holds NaN or Inf" in done.err


def test_verify_says_who_computed_and_fails_on_a_changed_tensor(pair, surgery):
    same = surgery("verify", *pair())
    assert same.status == 0 and same.out.count("features by pretrain") == 2
    paths = pair(lambda state: state["blocks.0.norm1.weight"].mul_(1.1))
    assert surgery("verify", *paths).status == 1
    assert json.loads(surgery("verify", *paths, "--json").out)["same"] is False
    other = surgery("verify", *pair(other=replace(PLAIN, img_size=98)))
    assert other.status == 2 and "takes images (2, 3, 98, 98)" in other.err


@pytest.mark.parametrize("name", MODELS)
def test_a_healthy_backbone_is_described_and_not_suspected(name, tmp_path, surgery):
    model = MODELS[name]
    path = write_export(tmp_path / "a.safetensors", random_state(model), model, {"step": 5})
    found = inspect(path)
    assert found.model == model and found.suspicions == [] and found.about == {"step": 5}
    assert [fact.name for fact in found.tensors] == list(random_state(model))
    done = surgery("inspect", path)
    assert done.status == 0 and "nothing suspicious" in done.out
    words = f"{model.num_register_tokens} registers, {'no ' if model.layer_scale is None else ''}LayerScale"
    assert f"{model.ffn_layer} of" in done.out and words in done.out


def test_norms_are_those_of_linear_algebra():
    state = random_state(GIANT)
    for name, tensor in state.items():
        facts = inspect_tensor(name, tensor)
        assert facts.norm == pytest.approx(tensor.double().norm().item(), rel=1e-6)
        assert facts.largest == pytest.approx(tensor.abs().max().item())
        if facts.spectral is not None:
            exact = torch.linalg.matrix_norm(tensor.double().flatten(1), ord=2).item()
            assert facts.spectral == pytest.approx(exact, rel=1e-3)
    assert spectral_norm(torch.zeros(4, 5)) == 0.0 == spectral_norm(torch.zeros(0, 5))
    assert spectral_norm(torch.tensor([[3.0, 4.0]])) == pytest.approx(5.0)


def broken(state):
    state["blocks.2.attn.proj.weight"][0, 0] = float("inf")
    state["blocks.2.attn.proj.weight"][1] = float("nan")
    state["blocks.1.mlp.w3.weight"].mul_(100)
    state["blocks.3.mlp.w12.weight"].zero_()
    for name in state:
        if name.endswith("gamma"):
            state[name].fill_(1e-5)


def test_what_a_healthy_backbone_does_not_have_is_suspicious(tmp_path, surgery):
    state = random_state(GIANT)
    broken(state)
    state["cls_token"] = state["cls_token"].half()
    path = write_export(tmp_path / "a.safetensors", state, GIANT, {})
    lines = "\n".join(inspect(path).suspicions)
    for words in (
        "blocks.2.attn.proj.weight: 128 NaN and 1 Inf among 16,384 values",
        "blocks.3.mlp.w12.weight: all 88,064 values are 0: was it ever loaded?",
        "blocks.1.mlp.w3.weight: norm ",
        "blocks.1.mlp.w3.weight: spectral norm ",
        "every LayerScale factor is 1e-5, DINOv2's initial value: these weights are untrained",
        "several types of numbers: float16, float32",
    ):
        assert words in lines
    done = surgery("inspect", path, "--no-spectral")
    assert done.status == 0 and done.out.count("suspicious: ") == len(
        inspect(path, spectral=False).suspicions
    )
    document = json.loads(surgery("inspect", path, "--json").out)
    assert document["model"]["ffn_layer"] == "swiglu" and len(document["tensors"]) == len(state)


def test_tensors_that_are_no_backbone_are_listed_all_the_same(tmp_path, surgery):
    torch.save({"conv1.weight": torch.ones(4, 3, 7, 7), "fc.bias": torch.arange(9)}, tmp_path / "resnet.pth")
    done = surgery("inspect", tmp_path / "resnet.pth")
    assert done.status == 0 and "no known backbone" in done.out and "no vision transformer" in done.out
    assert "conv1.weight" in done.out and "int64" in done.out
    assert suspicions([]) == []


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
    import subprocess
    import sys

    from tests.scripts import TOOLS

    path = write_export(tmp_path / "a.safetensors", random_state(PLAIN), PLAIN, {})
    command = f"{sys.executable} {TOOLS / 'surgery.py'} inspect {path} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(str(path))
