"""A model of transformers with random weights: what its own modules compute is what the tools report."""

import json

import pytest
import torch

from pretrain.analysis.backbone import build_backbone
from pretrain.analysis.images import ImageSet
from pretrain.analysis.taps import Place, places, pooled_features
from pretrain.data.writer import PackedSample, write_shards
from pretrain.export.transform import Order, convert
from pretrain.export.weights import read_weights
from tests.analysis.inputs import scenes
from tests.golden_files import relative_error
from tests.scripts import runner

pytestmark = pytest.mark.usefixtures("other_programs")
DEPTH, REGISTERS, SIZE = 3, 4, 56
MODULES = {
    "LN1": "norm1",
    "MHA": "attention",
    "MHA_LS": "layer_scale1",
    "LN2": "norm2",
    "FC1": "mlp.fc1",
    "FC2": "mlp.fc2",
    "FC2_LS": "layer_scale2",
    "RC2": "",
}


@pytest.fixture(scope="module")
def theirs():
    """Dinov2WithRegisters, its weights far from their small initial ones."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=14,
        num_register_tokens=REGISTERS,
    )
    model = transformers.Dinov2WithRegistersModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def files(theirs, tmp_path_factory):
    """Their folder, and the same as a file of this project."""
    folder = tmp_path_factory.mktemp("transformers")
    theirs.save_pretrained(folder / "theirs")
    convert(folder / "theirs", "ours", Order(folder / "ours.safetensors"))
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ours(files):
    return build_backbone(read_weights(files / "ours.safetensors"), torch.device("cpu"))


def outputs(model, images):
    """Tokens after each of their modules that is a place of ours."""
    found = {}

    def keep(place):
        def hook(_module, _inputs, output):
            found[place] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(place):
        def hook(_module, inputs):
            found[place] = inputs[0]

        return hook

    hooks = []
    for block, layer in enumerate(model.encoder.layer):
        for point, name in MODULES.items():
            hooks.append(layer.get_submodule(name).register_forward_hook(keep(Place(block, point))))
        for point, module in (("RC1", layer.norm2), ("Act", layer.mlp.fc2)):
            hooks.append(module.register_forward_pre_hook(keep_input(Place(block, point))))
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def test_every_place_holds_what_their_module_computes(theirs, ours, images):
    expected = outputs(theirs, images)
    features = pooled_features(ours, images, places(ours.cfg))
    assert set(features) == set(expected)
    for place, tokens in expected.items():
        cls, mean = features[place]
        assert relative_error(cls, tokens[:, 0]) < 1e-5, place
        assert relative_error(mean, tokens[:, 1 + REGISTERS :].mean(dim=1)) < 1e-5, place


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    pictures, _, classes = scenes(36, SIZE)
    for number, (picture, label) in enumerate(zip(pictures, classes, strict=True)):
        (folder / f"class{label}").mkdir(exist_ok=True)
        picture.save(folder / f"class{label}" / f"{number:02d}.png")
    return folder


def replaced(model, images, values):
    """Patches after the final norm, with their registers replaced after each block: values (DEPTH, R, D)."""

    def put(value):
        def hook(_module, _inputs, output):
            tokens = (output[0] if isinstance(output, tuple) else output).clone()
            tokens[:, 1 : 1 + REGISTERS] = value
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        return hook

    layers = model.encoder.layer
    hooks = [layer.register_forward_hook(put(value)) for layer, value in zip(layers, values, strict=True)]
    found = model(images).last_hidden_state[:, 1 + REGISTERS :]
    for hook in hooks:
        hook.remove()
    return found


def test_the_register_tool_says_what_replacing_their_tokens_does(theirs, files, photos, capsys, monkeypatch):
    run = runner("registers", capsys, monkeypatch)
    amounts = ("--number", 12, "--train", 12, "--calibration-images", 12)
    conditions = ("--conditions", "registers:zero,registers:mean,reg:2:random,cls:zero")
    both = [
        run(files / name, "--images", photos, *amounts, *conditions, "--json")
        for name in ("theirs", "ours.safetensors")
    ]
    assert [done.status for done in both] == [0, 0], both[0].err + both[1].err
    documents = [json.loads(done.out) for done in both]
    assert documents[0] == documents[1]

    images = ImageSet(str(photos), SIZE)
    order = images.drawn(0, 36)
    scored, calibrating = (
        torch.stack([images.read(index) for index in part]) for part in (order[:12], order[24:])
    )
    full = theirs(scored).last_hidden_state[:, 1 + REGISTERS :]
    outputs_of = [tokens for place, tokens in outputs(theirs, calibrating).items() if place.point == "RC2"]
    means = torch.stack([tokens[:, 1 : 1 + REGISTERS].mean(dim=0) for tokens in outputs_of])
    for name, values in (("zero", torch.zeros_like(means)), ("mean", means)):
        cosine = torch.cosine_similarity(full, replaced(theirs, scored, values), dim=-1).mean()
        found = documents[0]["effects"][f"registers:{name}"]["cosine_mean"]
        assert found == pytest.approx(float(cosine), abs=1e-6), name
        assert found < 0.9999


def test_probes_find_the_same_rows(files, photos, tmp_path, capsys, monkeypatch):
    run = runner("probe", capsys, monkeypatch)
    samples = [
        PackedSample(path.stem, "png", path.read_bytes(), int(path.parent.name[-1]), {})
        for path in sorted(photos.rglob("*.png"))
    ]
    write_shards(samples[::2], tmp_path, "train", 100)
    write_shards(samples[1::2], tmp_path, "test", 100)
    sets = ("--train", tmp_path / "train-*.tar", "--test", tmp_path / "test-*.tar")
    for name in ("theirs", "ours.safetensors"):
        done = run(files / name, *sets, "--corrupt", "contrast:5", "--C", 0.1, 1, "--out", tmp_path / name)
        assert done.status == 0, done.err
    rows = [(tmp_path / name / "rows.jsonl").read_text() for name in ("theirs", "ours.safetensors")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 1 + 10 * DEPTH
