"""The evaluation tool as a user calls it, on images whose colour tells the class."""

import io
import json
import re
import shlex

import pytest
import torch
from torch import Tensor

from pretrain.analysis.evaluation import Score, alignment_scores, differences, segmentation_scores
from pretrain.analysis.evaluation_report import Subject, score_rows
from pretrain.analysis.view import View
from pretrain.data.writer import PackedSample, write_shards
from pretrain.errors import InputError
from tests.analysis.inputs import scenes, write_model
from tests.analysis.test_page import pictures_of, stands_alone
from tests.scripts import TOOLS, load, runner
from tests.small import small_model

SIDE = 32


@pytest.fixture
def evaluate(capsys, monkeypatch):
    return runner("evaluate", capsys, monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards train (48) and test (24), and a folder of images with masks."""
    folder = tmp_path_factory.mktemp("data")
    for name, number, seed in (("train", 48, 1), ("test", 24, 2)):
        images, _, classes = scenes(number, SIDE, seed)
        samples = [
            PackedSample(f"{i:03d}", "png", content(image), label, {})
            for i, (image, label) in enumerate(zip(images, classes, strict=True))
        ]
        write_shards(samples, folder, name, 100)
    images, masks, _ = scenes(12, SIDE, seed=3)
    for kind, pictures in (("photos", images), ("masks", masks)):
        (folder / kind).mkdir()
        for i, picture in enumerate(pictures):
            picture.save(folder / kind / f"{i}.png")
    return folder


def content(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [
        write_model(folder / "one.safetensors", small_model()),
        write_model(folder / "two.safetensors", small_model(num_register_tokens=2), seed=1),
    ]


def shards(data) -> tuple:
    return ("--train", data / "train-*.tar", "--test", data / "test-*.tar", "--resize", SIDE, "--epochs", 1)


def by_name(model: dict) -> dict[str, dict]:
    return {f"{score['group']}: {score['name']}": score for score in model["scores"]}


def test_models_are_scored_side_by_side(data, models, evaluate, tmp_path):
    page = tmp_path / "e.html"
    masks = ("--images", data / "photos", "--masks", data / "masks")
    done = evaluate(*models, *shards(data), *masks, "--rates", 0.01, 0.1, 1, "--report", page, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert json.loads((tmp_path / "e.figures.json").read_text()) == found
    for model in found["models"]:
        scores = by_name(model)
        assert {name.partition(":")[0] for name in scores} == {
            *("k-NN", "linear", "retrieval", "attention consistency", "segmentation", "alignment")
        }
        assert all(score["low"] <= score["value"] + 1e-9 <= score["high"] + 2e-9 for score in scores.values())
        assert scores["linear: chosen on held-out training images"]["value"] > 90  # red or green
        assert len(model["linear"]["grid"]) == 3 * 4
        assert {point["blocks"] for point in model["linear"]["grid"]} == {1, 2}  # all that two blocks have
        assert [name for name in scores if name.startswith("k-NN")] == ["k-NN: k = 10", "k-NN: k = 20"]
        area = scores["alignment: area of the objects: what ignorance scores"]["value"]
        assert area == pytest.approx(100 * (10 / SIDE) ** 2)  # squares of 10 px
        assert scores["alignment: PCA foreground, IoU"]["value"] > area  # bright on dark
    html = page.read_text()
    assert stands_alone(html) and "two minus one" in html
    assert len(pictures_of(html)) == 6 * (2 + 2 * 3) + 2


def test_classes_alone_are_enough(data, models, evaluate):
    done = evaluate(models[0], *shards(data), "--number", 4, "--rates", 0.1)
    assert done.status == 0, done.err
    assert "recall@1" in done.out and "other image" in done.out and "alignment" not in done.out


def test_four_patches_are_enough_for_a_report(data, evaluate, tmp_path):
    coarse = write_model(tmp_path / "coarse.safetensors", small_model(patch_size=16))
    done = evaluate(coarse, *shards(data), "--rates", 0.1, "--report", tmp_path / "c.html")
    assert done.status == 0, done.err
    assert "crop" not in done.out and "rotation" in done.out
    assert len(pictures_of((tmp_path / "c.html").read_text())) == 6 * 3 + 1  # no foreground: no inner patch


@pytest.mark.parametrize("name", ["evaluate", "visualize"])
def test_shown_commands_are_accepted(name):
    tool = load(name)
    for page in (TOOLS / "README.md", TOOLS.parent / "docs" / "evaluation.md"):
        commands = re.findall(rf"python tools/{name}\.py ([^`\n]*)", page.read_text())
        assert commands and all(tool.parse(shlex.split(text, comments=True)).sources for text in commands)


def looked(masks: Tensor, noise: float) -> View:
    """Tokens and attention that follow the masks (n, 32, 32), four pixels a patch."""
    generator = torch.Generator().manual_seed(0)
    grid = masks[:, 2::4, 2::4]
    tokens = 6 * torch.eye(3, 8)[grid] + noise * torch.randn(*grid.shape, 8, generator=generator)
    attention = torch.stack([grid > 0, torch.rand(grid.shape, generator=generator)], dim=1).double()
    return View(torch.ones(len(masks), 1, 8, 8), attention, tokens)


def test_alignment_and_segmentation_see_what_features_show():
    masks = torch.zeros(8, 32, 32, dtype=torch.int64)
    for i in range(8):
        masks[i, 8:20, 4 + i // 2 * 4 :][:, :12] = 1 + i % 2
    scores = {score.name: score.value for score in alignment_scores(looked(masks, 0.1), masks)}
    assert scores["PCA foreground, IoU"] == 100
    # 6 of the 9 patches of an object hold 60 % of an even map
    assert scores["attention, IoU, oracle: best head"] == pytest.approx(100 * 6 / 9)
    assert scores["attention, pointing game"] == 100 > scores["attention, energy inside"] > 20
    good, bad = (segmentation_scores(looked(masks, noise), masks)[0] for noise in (0.1, 50.0))
    assert good.low <= good.value <= good.high and good.value > 2 * bad.value
    unseen = masks.clone()
    unseen[4:] = 255
    with pytest.raises(InputError, match="in the half that is scored all is ignored"):
        segmentation_scores(looked(masks, 0.1), unseen)
    with pytest.raises(InputError, match="alignment needs an object"):
        alignment_scores(looked(masks, 0.1), torch.zeros_like(masks))


def test_differences_are_taken_image_by_image():
    generator = torch.Generator().manual_seed(0)
    hard = 50 * torch.randn(100, generator=generator)
    better = hard + 1 + 0.1 * torch.randn(100, generator=generator)
    first, second = (Score("g", "n", float(v.mean()), 0, 0, values=v) for v in (hard, better))
    (found,) = differences([first], [second])
    assert 0.9 < found.low < found.value < found.high < 1.1
    assert differences([first], [Score("g", "other", 0, 0, 0, values=better)]) == []
    other = Score("g", "other", 7, 6, 8, percent=False)
    subjects = [Subject(str(i), scores, None, None) for i, scores in enumerate([[first], [second, other]])]
    assert [(row[1], row[2] == "-") for row in score_rows(subjects)] == [("n", False), ("other", True)]
    assert score_rows(subjects)[1][3] == "7.00 [6.00, 8.00]"


def test_wrong_input_is_one_line(data, models, evaluate, tmp_path):
    unlabelled = write_shards(
        [PackedSample("a", "png", content(scenes(1, SIDE)[0][0]), None, {})], tmp_path, "u", 9
    )
    page = tmp_path / "mine.html"
    page.write_text("mine")
    for arguments, words in (
        (("--report", page), "exists; choose another name, or --force"),
        (("--masks", data / "masks"), "--masks: needs --images"),
        (("--rates", 0), "--rates: must be above 0"),
        (("--number", 1), "needs two or more images"),
        (("--number", 25), "holds 24, 25 are asked for"),
        (("--epochs", 0), "--epochs: must be at least 1"),
        (("--device", "meta"), "argument --device: meta: this machine, or its torch, has no such device"),
        (("--size", 30), "not a multiple of the patch size 8"),
        (("--size", 64), "does not fit a shorter side of 32"),
        (("--train", tmp_path / "no-*.tar"), "--train"),
        (("--train", unlabelled[0]), "has no label"),
    ):
        done = evaluate(models[0], *shards(data), *arguments)
        assert done.status == 2 and words in done.err and done.err.count("\n") == 1, (arguments, done.err)
    assert page.read_text() == "mine"
