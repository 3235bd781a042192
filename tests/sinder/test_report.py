"""Reports and comparisons: what is drawn and counted is what the models do on these images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data.writer import PackedSample, write_shards
from pretrain.export import write_export
from tests.analysis.test_page import pictures_of, stands_alone
from tests.sinder.planted import BLOCK, MODELS, clean_backbone, plant


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A backbone with a planted defect, and the same without."""
    folder, model = tmp_path_factory.mktemp("pair"), MODELS["mlp-registers"]
    backbone = clean_backbone(model)
    clean = write_export(folder / "clean.safetensors", backbone.state_dict(), model, {})
    plant(backbone, gain=14.0)
    return write_export(folder / "bad.safetensors", backbone.state_dict(), model, {}), clean


@pytest.fixture(scope="module")
def masks(photos, tmp_path_factory):
    """Bright or dark, pixel by pixel."""
    folder = tmp_path_factory.mktemp("masks")
    for path in Path(photos).iterdir():
        pixels = np.array(Image.open(path)).astype(int)
        Image.fromarray((pixels.mean(axis=2) > 120).astype(np.uint8)).save(folder / path.name)
    return folder


def test_a_diagnosis_becomes_a_page_that_stands_alone(pair, photos, sinder, tmp_path):
    page = tmp_path / "d.html"
    done = sinder("diagnose", pair[0], "--images", photos, "--report", page, "--json")
    assert done.status == 0
    html = page.read_text()
    assert stands_alone(html) and f"defective: after block {BLOCK}, " in html
    # six images: themselves, norms before, at and after the defect, marks, components; and seven plots
    assert len(pictures_of(html)) == 6 * 6 + 7
    assert json.loads((tmp_path / "d.figures.json").read_text()) == json.loads(done.out)


def test_weights_alone_give_a_page_too(pair, sinder, tmp_path):
    page = tmp_path / "w.html"
    assert sinder("diagnose", pair[0], "--report", page).status == 0
    html = page.read_text()
    assert stands_alone(html) and len(pictures_of(html)) == 2 and "unknown: " in html


def test_models_are_compared_by_the_thresholds_of_the_first(pair, photos, masks, sinder, tmp_path):
    page = tmp_path / "c.html"
    command = ("compare", *pair, "--images", photos, "--masks", masks, "--report", page, "--json")
    done = sinder(*command)
    assert done.status == 0, done.err
    bad, clean = json.loads(done.out)["models"]
    assert (bad["name"], bad["verdict"], clean["name"], clean["verdict"]) == (
        "bad",
        "defective",
        "clean",
        "clean",
    )
    before, after = (max(model["against_the_first"]["by_both"]) for model in (bad, clean))
    assert before > 0.005 and after < before / 10
    assert bad["against_the_first"]["cls_cosine"] == pytest.approx(1, abs=1e-6)
    assert 0.99 < clean["against_the_first"]["cls_cosine"] < 1
    assert all(50 < model["segmentation"]["miou"] <= 100 for model in (bad, clean))  # of two even classes
    html = page.read_text()
    assert stands_alone(html) and len(pictures_of(html)) == 6 * 7 + 8
    text = sinder("compare", *pair, "--images", photos)
    assert text.status == 0 and "clean patches, cosine to the first" in text.out


def test_k_nearest_neighbours_are_scored_where_labels_are_given(pair, photos, sinder, tmp_path):
    files = sorted(Path(photos).iterdir())[:28]
    samples = [PackedSample(f"{i:04d}", "png", path.read_bytes(), i % 2, {}) for i, path in enumerate(files)]
    for name, chosen in (("train", samples[:20]), ("test", samples[20:])):
        write_shards(chosen, tmp_path, name, 64)
    shards = ("--knn-train", tmp_path / "train-*.tar", "--knn-test", tmp_path / "test-*.tar")
    done = sinder("compare", pair[0], pair[0], "--images", photos, "--json", *shards)
    assert done.status == 0, done.err
    first, second = (model["knn_percent"] for model in json.loads(done.out)["models"])
    assert first == second and set(first) == {"cls", "patch_mean"} and 0 <= first["cls"] <= 100


def test_a_repair_reports_and_logs(pair, photos, sinder, tmp_path):
    out, page, log = tmp_path / "out.safetensors", tmp_path / "r.html", tmp_path / "log"
    short = ("--least", 2, "--limit-layers", 1, "--batch-size", 8, "--check-every", 16, "--max-images", 32)
    command = ("repair", pair[0], "--images", photos, "--out", out, *short)
    assert sinder(*command, "--report", page, "--log", log).status == 0
    lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [8, 16, 24, 32]
    assert [step["step"] for step in lines if "held_out/cls_cosine" in step] == [16, 32]
    assert list((log / "tensorboard").iterdir())
    html = page.read_text()
    assert stands_alone(html) and "Singular defects of bad, out" in html
    after = json.loads((tmp_path / "r.figures.json").read_text())["models"][1]["against_the_first"]
    assert after["cls_cosine"] == pytest.approx(lines[-1]["held_out/cls_cosine"], abs=1e-5)
    again = sinder(
        "repair", pair[0], "--images", photos, "--out", tmp_path / "other.safetensors", "--log", log
    )
    assert again.status == 2 and "holds the log of something else" in again.err


def test_wrong_input_is_one_line(pair, photos, masks, sinder, tmp_path):
    model = MODELS["swiglu"]
    other = clean_backbone(type(model)(**{**vars(model), "depth": 4})).state_dict()
    shorter = write_export(
        tmp_path / "four.safetensors", other, type(model)(**{**vars(model), "depth": 4}), {}
    )
    page, rgb, few = tmp_path / "page.html", tmp_path / "rgb", tmp_path / "few"
    page.write_text("mine")
    for folder in (rgb, few):
        folder.mkdir()
    for path in Path(photos).iterdir():
        Image.open(path).save(rgb / path.name)
    images = ("--images", photos)
    for command, words in (
        (("diagnose", pair[0], "--report", page), f"{page} exists; choose another name, or --force"),
        (("diagnose", pair[0], "--report", tmp_path / "page.pdf"), "must end in .html"),
        (("compare", pair[0], shorter, *images), "has 4 blocks, "),
        (("compare", *pair, *images, "--masks", few), "cannot be read as the mask of"),
        (("compare", *pair, *images, "--masks", rgb), "a mask has one channel of class numbers"),
        (("compare", *pair, *images, "--knn-train", "a.tar"), "one is given without the other"),
        (("compare", *pair, *images, "--knn-train", "a.tar", "--knn-test", "b.tar"), "a.tar"),
    ):
        done = sinder(*command)
        assert done.status == 2 and words in done.err and done.err.count("\n") == 1, done.err
    assert page.read_text() == "mine"


def test_marks_lie_on_the_defective_patches():
    from pretrain.analysis.marks import marked

    defective = torch.zeros(4, 4, dtype=torch.bool)
    defective[1, 2] = True
    drawn = marked(torch.rand(3, 32, 32), defective)
    red = (drawn[0] > 0.99) & (drawn[1] < 0.11)
    assert red[8:16, 16:24].all() and red.sum() == 64
