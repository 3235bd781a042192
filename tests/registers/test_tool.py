"""The tool as a user calls it: all outputs say the same, and wrong input is one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.analysis.images import ImageSet
from pretrain.data.writer import PackedSample, write_shards
from pretrain.export import write_export
from pretrain.registers.samples import split
from tests.analysis.test_page import pictures_of, stands_alone
from tests.registers.conftest import MODEL, backbone_of

FEW = ("--number", 15, "--train", 21, "--calibration-images", 20, "--attention-images", 6)
TASKS = [
    *("linear, class token, fixed", "linear, class token, refit", "recall@1, class token"),
    *("linear, mean patch, fixed", "linear, mean patch, refit", "recall@1, mean patch"),
    *("correspondence", "cycle consistency"),
]
KEYED = "registers:zero,registers:noise,registers:bank,reg:2:random,patch:4:bank"


@pytest.fixture(scope="module")
def masks(photos, tmp_path_factory):
    """Bright or dark, pixel by pixel."""
    folder = tmp_path_factory.mktemp("masks")
    for path in photos.rglob("*.png"):
        pixels = np.array(Image.open(path)).astype(int)
        place = folder / path.relative_to(photos)
        place.parent.mkdir(exist_ok=True)
        Image.fromarray((pixels.mean(axis=2) > 120).astype(np.uint8)).save(place)
    return folder


def numbers(document):
    """All figures of a document, in order."""
    match document:
        case dict():
            return [one for value in document.values() for one in numbers(value)]
        case list():
            return [one for value in document for one in numbers(value)]
        case bool() | str() | None:
            return []
    return [document]


def test_labelled_images_get_all_tasks_and_a_page_that_stands_alone(files, photos, tool, tmp_path):
    page = tmp_path / "r.html"
    done = tool(files["registers"], "--images", photos, *FEW, "--json", "--report", page)
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert list(document["scores"]) == TASKS and document["classes"] == 3
    assert (document["images"], document["calibration_images"], document["left_out"]) == (15, 20, [])
    names = list(document["effects"])
    assert len(names) == 11
    for task, scores in document["scores"].items():
        assert list(scores) == ["full", *names], task
        assert all(0 <= own["score"]["mean"] <= 100 for own in scores.values())
        for name in names:
            lost = scores[name]["difference"]
            assert lost["low"] <= lost["mean"] <= lost["high"] and 0 < scores[name]["p_value"] <= 1
    for name, effect in document["effects"].items():
        assert effect["attention"]["divergence"][0] == 0 and effect["cosine_mean"] < 1
        assert all((ratio is None) == name.endswith("zero") for ratio in effect["oddness"]["log_norm"])
    fixed = document["scores"]["linear, class token, fixed"]
    assert fixed["full"]["score"]["mean"] > 60 and fixed["cls:mean"]["score"]["mean"] <= 60  # content lost
    refit = document["scores"]["linear, class token, refit"]["cls:zero"]["score"]["mean"]
    assert refit <= 60  # all class tokens are the same
    html = page.read_text()
    assert stands_alone(html) and len(pictures_of(html)) == 4 * 13 + 4
    assert all(finding["line"].split(";")[0] in html for finding in document["findings"])
    assert json.loads((tmp_path / "r.figures.json").read_text()) == document


def test_the_terminal_shows_every_condition_of_every_task(files, photos, tool):
    done = tool(files["registers"], "--images", photos, *FEW, "--conditions", "registers:zero,cls:bank")
    assert done.status == 0 and done.err == ""
    assert all(done.out.count(name) == 10 for name in ("registers:zero", "cls:bank"))
    assert "effective rank" in done.out and "content of cls is" in done.out


def test_batch_size_changes_nothing(files, photos, tool):
    found = []
    command = (files["registers"], "--images", photos, "--json", "--conditions", KEYED)
    for size in (1, 8):
        done = tool(*command, *FEW, "--batch-size", size, "--pairs", 2)
        assert done.status == 0, done.err
        found.append(numbers(json.loads(done.out)["effects"]))
    assert found[0] == pytest.approx(found[1], abs=2e-4, rel=1e-3)


def test_a_calibration_is_kept_and_used_again(files, photos, tool, tmp_path):
    file = tmp_path / "kept.safetensors"
    command = (files["registers"], "--images", photos, "--json", "--conditions", "registers:bank")
    first = tool(*command, *FEW, "--calibration", file)
    assert first.status == 0 and file.exists()
    written = file.read_bytes()
    again = tool(*command, *FEW, "--calibration", file)
    assert json.loads(again.out) == json.loads(first.out) and file.read_bytes() == written
    for change, words in (
        (("--seed", 1), "images are evaluated here"),
        (("--size", 16), "was made with shorter side 32 px"),
    ):
        done = tool(*command, *FEW, "--calibration", file, *change)
        assert done.status == 2 and words in done.err and done.err.count("\n") == 1, done.err
    other = backbone_of(MODEL)
    other.cls_token.add_(1)
    changed = write_export(tmp_path / "other.safetensors", other.state_dict(), MODEL, {})
    done = tool(changed, *command[1:], *FEW, "--calibration", file)
    assert done.status == 2 and "was made with another model" in done.err
    done = tool(*command, *FEW, "--calibration", file, "--num-heads", 8)
    assert done.status == 2 and "was made with another model" in done.err


def test_without_classes_there_are_correspondence_and_masks(files, photos, masks, tool, tmp_path):
    flat, beside = tmp_path / "flat", tmp_path / "masks"
    for source, target in ((photos, flat), (masks, beside)):
        target.mkdir()
        for path in source.rglob("*.png"):
            shutil.copy(path, target / f"{path.parent.name}_{path.name}")
    command = (
        files["registers"],
        "--images",
        flat,
        *FEW,
        "--json",
        "--conditions",
        "registers:zero,cls:zero",
    )
    done = tool(*command)
    assert done.status == 0 and list(json.loads(done.out)["scores"]) == TASKS[-2:]
    done = tool(*command, "--masks", beside)
    assert done.status == 0, done.err
    scores = json.loads(done.out)["scores"]
    assert list(scores) == [*TASKS[-2:], "segmentation, fixed", "segmentation, refit"]
    fixed, refit = scores["segmentation, fixed"], scores["segmentation, refit"]
    assert fixed["full"] == refit["full"] and fixed["full"]["score"]["mean"] > 45
    assert fixed["registers:zero"] != refit["registers:zero"]  # another probe


def test_a_model_without_registers_keeps_the_other_conditions_and_says_so(files, photos, tool):
    done = tool(files["plain"], "--images", photos, *FEW, "--json")
    assert done.status == 0
    document = json.loads(done.out)
    assert list(document["effects"]) == ["cls:zero", "cls:mean", "cls:bank", "patch:4:zero", "patch:4:mean"]
    assert len(document["left_out"]) == 6
    assert "has no registers; left out: registers:zero, " in done.err and done.err.count("\n") == 1


def test_shards_with_classes_and_a_damaged_image(files, photos, tool, tmp_path):
    paths = sorted(photos.rglob("*.png"))
    samples = [
        PackedSample(f"{i:03d}", "png", path.read_bytes() if i else b"no image", i // 20, {})
        for i, path in enumerate(paths)
    ]
    write_shards(samples, tmp_path, "all", 64)
    few = ("--number", 20, "--train", 20, "--calibration-images", 20, "--conditions", "registers:bank")
    done = tool(files["registers"], "--images", tmp_path / "all-*.tar", *few, "--json")
    assert done.status == 0 and list(json.loads(done.out)["scores"]) == TASKS
    assert done.err.count("left out: ") == 1 and "000: " in done.err


def test_damaged_images_for_probes_are_one_line(files, photos, masks, tool, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    images = ImageSet(str(tmp_path / "photos"), 32)
    for index in split(images, 0, 15, 21, 20).train:
        images.files[index].write_bytes(b"no image")
    command = (files["registers"], "--images", tmp_path / "photos", *FEW, "--conditions", "cls:zero")
    for further in ((), ("--masks", masks)):
        done = tool(*command, *further)
        assert done.status == 2 and done.err.count("\n") == 1
        assert "--images: all that are wanted are damaged, as " in done.err


def test_wrong_input_is_one_line(files, photos, masks, tool, tmp_path):
    page, few = tmp_path / "page.html", tmp_path / "few"
    page.write_text("mine")
    for folder, number in (("class0", 45), ("class1", 2)):
        (few / folder).mkdir(parents=True)
        for path in sorted(photos.rglob("*.png"))[:number]:
            shutil.copy(path, few / folder / f"{path.parent.name}_{path.name}")
    plain, images = (files["plain"],), ("--images", photos)
    own = (files["registers"], *images, *FEW)
    for command, words in (
        ((files["registers"],), "--images"),
        ((*own, "--report", page), f"{page} exists; choose another name, or --force"),
        ((*own, "--report", tmp_path / "page.pdf"), "must end in .html"),
        ((*own, "--calibration", tmp_path / "c.pt"), "must end in .safetensors"),
        ((*own, "--calibration", files["plain"]), "is no calibration"),
        ((*own, "--conditions", "registers"), "'registers' is none"),
        ((*own, "--conditions", "reg:5:zero"), "the model has registers 1 to 4"),
        ((*own, "--conditions", "patch:16:zero"), "16 patches, one must stay"),
        ((*own, "--conditions", "patch:5:bank"), "calibration keeps 4 patches"),
        ((*own, "--blocks", "2-3"), "blocks 0 to 2"),
        ((*own, "--batch-size", 1), "take 2 or more"),
        ((*own, "--pairs", 0), "--pairs: must be at least 1"),
        ((*own, "--size", 20), "not a multiple of the patch size 8"),
        ((*own, "--masks", tmp_path), "cannot be read as the mask of"),
        ((*plain, *images, *FEW, "--conditions", "registers:zero"), "the model has no registers"),
        ((*plain, *images), "holds 60 images, 1100 are asked for"),
        ((*plain, "--images", tmp_path / "none"), "none"),
        ((*plain, "--images", few, "--number", 4, "--train", 2, "--calibration-images", 4), "one class only"),
    ):
        done = tool(*command)
        assert done.status == 2 and words in done.err and done.err.count("\n") == 1, (command, done.err)
    assert page.read_text() == "mine"


def test_blocks_after_the_last_one_change_no_patch(files, photos, tool):
    done = tool(
        *(files["registers"], "--images", photos, *FEW, "--json"),
        *("--conditions", "registers:zero,registers:random", "--blocks", 2),
    )
    document = json.loads(done.out)
    for effect in document["effects"].values():
        assert effect["cosine_mean"] == pytest.approx(1, abs=1e-6)
        assert effect["attention"]["divergence"] == [0, 0, 0] and len(effect["oddness"]["distance"]) == 1
    lost = [own["difference"] for scores in document["scores"].values() for own in list(scores.values())[1:]]
    assert all(torch.tensor(list(one.values())).abs().max() == 0 for one in lost)
