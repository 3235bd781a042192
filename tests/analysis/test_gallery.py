"""Pictures of what models see: maps are the model's own, and the tool writes what it says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from pretrain.analysis.gallery import Wanted, gallery, outlier_shares, similarity
from pretrain.analysis.maps import cls_attention
from pretrain.analysis.plots import heat
from pretrain.analysis.view import View, view
from pretrain.errors import InputError
from pretrain.models.init import init_weights
from pretrain.models.vit import VisionTransformer
from tests.analysis.inputs import scenes, write_model
from tests.analysis.test_page import pictures_of, stands_alone
from tests.scripts import runner
from tests.small import small_model


@pytest.fixture
def visualize(capsys, monkeypatch):
    return runner("visualize", capsys, monkeypatch)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate(scenes(6, 40)[0]):
        image.save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("registers", [0, 3])
def test_a_view_is_what_the_model_computes(registers):
    backbone = VisionTransformer(small_model(num_register_tokens=registers, depth=3), "math")
    init_weights(backbone, 0)
    images = torch.randn(5, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    seen = view(backbone, images, batch_size=2, block=1)
    torch.testing.assert_close(seen.patches.flatten(1, 2), backbone([images])[0].patches.detach())
    torch.testing.assert_close(seen.attention, cls_attention(backbone, images, 1))
    assert not torch.allclose(seen.attention, cls_attention(backbone, images))
    backbone.norm = torch.nn.Identity()  # what is left are the tokens after the last block
    norms = backbone([images])[0].patches.detach().norm(dim=-1).unflatten(1, (4, 5))
    torch.testing.assert_close(seen.norms[:, -1], norms)
    assert seen.norms.shape == (5, 3, 4, 5)
    with pytest.raises(InputError, match="the model has blocks 0 to 2"):
        view(backbone, images, 2, block=3)


def made_up(grid: int, seed: int) -> View:
    generator = torch.Generator().manual_seed(seed)
    norms = 1 + 0.1 * torch.rand(2, 3, grid, grid, generator=generator)
    norms[1, 2, 1, 3] = 9
    attention = torch.rand(2, 4, grid, grid, generator=generator)
    return View(norms, attention, torch.randn(2, grid, grid, 8, generator=generator))


def test_parts_lay_models_side_by_side():
    views = {"a": made_up(4, 0), "b": made_up(8, 1)}
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    parts = {part.heading: part.columns for part in gallery(views, pixels, Wanted((1, 3), [2], heads=2))}
    assert list(parts["Components"]) == ["image", "a PCA", "a foreground", "b PCA", "b foreground"]
    assert list(parts["Attention"])[:4] == ["image", "a attention", "a head 0", "a head 1"]
    assert list(parts["Norms"]) == ["image", "a block 2", "b block 2"]
    red = parts["Artifacts"]["a outliers"][1].movedim(0, -1) == torch.tensor([1.0, 0.1, 0.1])
    assert red.all(-1)[8:16, 24:32].all() and red.all(-1).sum() == 64  # patch (1, 3) of 8 px
    # the middle of patch (1, 3) of a 4 x 4 grid lies in patch (3, 7) of an 8 x 8 one
    for name, place in (("a", (1, 3)), ("b", (3, 7))):
        tokens = views[name].patches
        expected = cosine_similarity(tokens, tokens[0][place], dim=-1)
        torch.testing.assert_close(parts["Similarity"][f"{name} cosine"], heat(expected, 0, 1))
    torch.testing.assert_close(similarity(tokens, 0, 3, 7), expected)
    assert outlier_shares(views["a"])[:2] == [0, 0] and outlier_shares(views["a"])[2] == 1 / 32
    for wanted, words in ((Wanted((4, 0)), "4 rows and 4 columns"), (Wanted(blocks=[3]), "blocks 0 to 2")):
        with pytest.raises(InputError, match=words):
            gallery(views, pixels, wanted)


def test_the_tool_writes_a_sheet_and_a_page(photos, visualize, tmp_path):
    one = write_model(tmp_path / "one.safetensors", small_model())
    two = write_model(tmp_path / "two.safetensors", small_model(num_register_tokens=2), seed=1)
    done = visualize(one, two, "--images", photos, "--number", 3, "--out", tmp_path / "seen")
    assert done.status == 0, done.err
    html = (tmp_path / "seen" / "page.html").read_text()
    assert stands_alone(html)
    # image and, of each model, 2 components; 3 maps of attention; 2 norms; outliers; cosines; one plot
    assert len(pictures_of(html)) == 3 * (5 + 7 + 5 + 3 + 3) + 1
    figures = json.loads((tmp_path / "seen" / "page.figures.json").read_text())
    assert set(figures["outlier_percent_by_block"]) == {"one", "two"}
    sheet = np.array(Image.open(tmp_path / "seen" / "sheet.png"))
    assert sheet.shape[1] == 7 * (128 + 4) and sheet[200:].std() > 10
    for name in ("a.png", "b.html"):
        assert visualize(one, "--images", photos, "--number", 3, "--out", tmp_path / name).status == 0
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.html").exists()
    assert not (tmp_path / "a.html").exists() and not (tmp_path / "b.png").exists()
    twice = visualize(one, one, "--images", photos, "--number", 1, "--out", tmp_path / "twice.html")
    assert twice.status == 0, twice.err  # a model beside itself shows the same
    first, second = json.loads((tmp_path / "twice.figures.json").read_text())[
        "outlier_percent_by_block"
    ].items()
    assert (first[0], second[0]) == (f"{one}", f"{one} (2)") and first[1] == second[1]
    for block, said in ((-2, "of block -2"), (-1, "of the last block"), (1, "of block 1")):
        page = tmp_path / f"block{block}.html"
        assert visualize(one, "--images", photos, "--number", 1, "--out", page, "--block", block).status == 0
        assert json.loads(page.with_suffix(".figures.json").read_text())["attention"] == said


def test_wrong_input_is_one_line(photos, visualize, tmp_path):
    model = write_model(tmp_path / "one.safetensors", small_model())
    (tmp_path / "mine.png").write_text("mine")
    for arguments, words in (
        (("--out", tmp_path / "mine.png"), "exists; choose another name, or --force"),
        (("--out", tmp_path / "x", "--number", 7), "holds 6, 7 are asked for"),
        (("--out", tmp_path / "x", "--number", 0), "--number: must be at least 1"),
        (("--out", tmp_path / "x", "--patch", "9,0"), "--patch 9,0: the grid has 4 rows"),
        (("--out", tmp_path / "x", "--patch", "9"), "9 is not a row and a column"),
        (("--out", tmp_path / "x", "--block", 2), "--block 2: the model has blocks 0 to 1"),
        (("--out", tmp_path / "x", "--size", 30), "not a multiple of the patch size 8"),
    ):
        done = visualize(model, "--images", photos, *arguments)
        assert done.status == 2 and words in done.err and done.err.count("\n") == 1, done.err
    assert (tmp_path / "mine.png").read_text() == "mine" and not (tmp_path / "x").exists()
