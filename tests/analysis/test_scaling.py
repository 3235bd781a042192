"""How pixels become inputs: what the command line says, what weights say, what ImageNet says."""

import argparse
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.analysis.images import ImageSet
from pretrain.analysis.scaling import MEAN, STD, Scaling, add_scaling, scaling_for
from pretrain.data.labelled import labelled_batches
from pretrain.data.writer import PackedSample, write_shards
from pretrain.errors import InputError
from pretrain.export import write_export
from pretrain.export.weights import read_weights
from pretrain.models.init import init_weights
from pretrain.models.vit import VisionTransformer
from pretrain.start import run_facts
from tests.scripts import runner
from tests.small import small_config, small_model

GREY = Scaling([0.4], [0.2], [1000, 3000])


def weights_of(tmp_path, channels, about):
    model = small_model(in_channels=channels)
    backbone = VisionTransformer(model, "math")
    init_weights(backbone, 0)
    return read_weights(write_export(tmp_path / "a.safetensors", backbone.state_dict(), model, about))


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_scaling(parser)
    return parser.parse_args(map(str, arguments))


@pytest.mark.parametrize(
    ("channels", "said", "arguments", "expected"),
    [
        (3, None, (), Scaling(MEAN, STD)),
        (3, None, ("--mean", 0.5, 0.4, 0.3), Scaling([0.5, 0.4, 0.3], STD)),
        (1, GREY, (), GREY),
        (1, GREY, ("--std", 0.1, "--levels", 0, 10), Scaling([0.4], [0.1], [0, 10])),
        (2, None, ("--mean", 0.5, 0.4, "--std", 1, 1), Scaling([0.5, 0.4], [1, 1])),
    ],
)
def test_the_command_line_wins_over_the_weights_and_these_over_imagenet(
    channels, said, arguments, expected, tmp_path
):
    about = {"pixels": said.document()} if said else {}
    found = scaling_for(options(*arguments), weights_of(tmp_path, channels, about))
    assert found.document() == expected.document()


@pytest.mark.parametrize(
    ("channels", "about", "arguments", "line"),
    [
        (1, {}, (), r"--mean: .*a.safetensors takes 1 channels .*give 1 number, as in its training"),
        (1, {}, ("--mean", 0.5), "--std: .*give 1 number, as in"),
        (3, {}, ("--mean", 0.5), "--mean: .*takes 3 channels; give 3 numbers"),
        (3, {"pixels": {"mean": [0.5], "std": [1.0]}}, (), "--mean: .*takes 3 channels; give 3 numbers"),
        (3, {"pixels": {"mean": "x"}}, (), "what it says of its pixels cannot be read"),
        (3, {"pixels": 3}, (), "what it says of its pixels cannot be read"),
        (3, {}, ("--std", 1, 0, 1), "--std: must be finite numbers above 0"),
        (3, {}, ("--mean", 1, "nan", 1), "--mean: must be finite"),
        (3, {}, ("--levels", 5, 5), "--levels: 5.0 5.0 must be a lower and a higher level"),
    ],
)
def test_what_cannot_be_meant_is_refused(channels, about, arguments, line, tmp_path):
    with pytest.raises(InputError) as error:
        scaling_for(options(*arguments), weights_of(tmp_path, channels, about))
    assert re.search(line, str(error.value)) and "\n" not in str(error.value)


def test_a_run_writes_its_scaling_into_its_exports():
    said = run_facts(small_config(), 3)["pixels"]
    assert said == {"mean": list(MEAN), "std": list(STD), "window": None}


@pytest.fixture
def scans(tmp_path):
    """A folder of grey images of 16 bits, and the same as shards with two classes."""
    (tmp_path / "scans").mkdir()
    stream, samples = np.random.default_rng(0), []
    for number in range(12):
        levels = stream.integers(500, 3500, (32, 32)).astype(np.uint16)
        levels[8 * (number % 2) :, :8] = 2800
        path = tmp_path / "scans" / f"{number:02d}.png"
        Image.fromarray(levels).save(path)
        samples.append(PackedSample(path.stem, "png", path.read_bytes(), number % 2, {}))
    write_shards(samples, tmp_path, "scans", 100)
    return tmp_path


def test_grey_images_of_16_bits_become_what_the_loader_makes_of_them(scans):
    images = ImageSet(str(scans / "scans"), 32, GREY)
    batch = images.batch(range(12))
    shards = [str(scans / "scans-*.tar")]
    ((expected, _),) = labelled_batches(shards, "--images", 32, 32, GREY.mean, GREY.std, 12, 1, GREY.decoding)
    assert torch.equal(batch, expected)
    low, high = (0 - 0.4) / 0.2, (1 - 0.4) / 0.2
    assert batch.min() == pytest.approx(low) and batch.max() == pytest.approx(high)
    shown = GREY.shown(batch)
    assert shown.shape == (12, 3, 32, 32) and torch.equal(shown[:, 0], shown[:, 2])
    assert float(shown.min()) == 0 and float(shown.max()) == pytest.approx(1)


@pytest.mark.parametrize("tool", ["visualize", "evaluate", "probe", "registers", "sinder"])
def test_every_tool_takes_such_images_and_the_scaling_that_the_weights_name(
    tool, scans, tmp_path, capsys, monkeypatch
):
    weights = weights_of(tmp_path, 1, {"pixels": GREY.document()}).path
    folder, shards = scans / "scans", scans / "scans-*.tar"
    sets, page = ("--train", shards, "--test", shards), tmp_path / "page.html"
    few = ("--number", 4, "--calibration-images", 4, "--train", 4, "--conditions", "cls:zero")
    arguments = {
        "visualize": ("--images", folder, "--out", page),
        "evaluate": (*sets, "--images", folder, "--number", 2, "--epochs", 1, "--report", page),
        "probe": (*sets, "--out", tmp_path, "--C", 1, "--blocks", 1, "--points", "RC2"),
        "registers": ("--images", folder, *few, "--report", page),
        "sinder": ("--images", folder, "--number", 2, "--report", page),
    }[tool]
    verb = ("diagnose",) if tool == "sinder" else ()
    run = runner(tool, capsys, monkeypatch)
    done = run(*verb, weights, *arguments)
    assert done.status == 0, done.err
    other = run(*verb, weights, *arguments, "--mean", 1, 2)
    assert other.status == 2 and other.err.count("\n") == 1, other.err
