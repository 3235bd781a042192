"""Statistics are those of all tokens, and a file is used with nothing but what it was made for."""

import shutil
from dataclasses import replace

import pytest
import torch

from pretrain.analysis.images import ImageSet
from pretrain.analysis.taps import Place, tapped
from pretrain.errors import InputError
from pretrain.export.own import map_safetensors, write_tensors
from pretrain.registers.calibration import calibrate, load, preprocessing, save
from pretrain.registers.conditions import BANK_PATCHES, random_patches
from pretrain.registers.moments import Moments
from pretrain.registers.samples import batches, keys, split


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (12,), (1, 10, 1)])
def test_moments_in_batches_are_those_of_two_passes(sizes):
    values = 1e4 + torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Moments()
    for part in values.split(sizes):
        found.add(part)
    mean = values.mean(dim=0)
    torch.testing.assert_close(found.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.variance, (values - mean).square().mean(dim=0), rtol=1e-9, atol=0)


def test_calibration_is_what_all_tokens_of_the_images_are(backbone, image_set, calibration):
    rows = [*range(5, 20), *range(25, 40)]
    pixels = torch.stack([image_set.read(row) for row in rows])
    seen = {}
    looks = {Place(b, "RC2"): lambda t, b=b: seen.update({b: t.clone()}) for b in range(3)}
    with tapped(backbone, len(rows), looks), torch.no_grad():
        backbone([pixels])
    tokens = torch.stack([seen[b] for b in range(3)]).double()
    assert calibration.images == 30 and calibration.mean.shape == (3, 21, 32)
    torch.testing.assert_close(calibration.mean.double(), tokens.mean(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        calibration.var.double(), tokens.var(dim=1, correction=0), atol=1e-6, rtol=1e-3
    )
    assert calibration.bank.shape == (20, 3, 5 + BANK_PATCHES, 32)  # over three batches
    torch.testing.assert_close(
        calibration.bank[:, :, :5].double(), tokens[:, :20, :5].transpose(0, 1), atol=1e-5, rtol=1e-4
    )
    for image, key in enumerate(calibration.keys[:20]):
        kept = tokens[:, image, random_patches(key, BANK_PATCHES, 4, 16, 0)]
        torch.testing.assert_close(calibration.bank[image, :, 5:].double(), kept, atol=1e-5, rtol=1e-4)


def test_a_file_is_refused_with_anything_else(calibration, tmp_path):
    path = tmp_path / "c.safetensors"
    save(path, calibration)
    found = load(path, "weights", "preprocessing", ["another"])
    assert found.keys == calibration.keys
    assert all(torch.equal(getattr(found, n), getattr(calibration, n)) for n in ("mean", "var", "bank"))
    for weights, words, evaluated, said in (
        ("others", "preprocessing", [], "made with another model"),
        ("weights", "another", [], "made with preprocessing, not another"),
        ("weights", "preprocessing", calibration.keys[:2], "2 of its 30 images are evaluated here"),
    ):
        with pytest.raises(InputError, match=said):
            load(path, weights, words, evaluated)
    metadata, tensors = map_safetensors(path)
    for change, said in (
        ({"calibration": "a-later-one"}, "its format is a-later-one, this code reads"),
        ({"keys": "3"}, "is no calibration"),
    ):
        write_tensors(path, tensors, {**metadata, **change})
        with pytest.raises(InputError, match=said):
            load(path, "weights", "preprocessing", [])
    path.write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="is no calibration"):
        load(path, "weights", "preprocessing", [])


def test_preprocessing_is_told_in_words(image_set):
    assert "32 px" in preprocessing(image_set) and "0.485, 0.456, 0.406" in preprocessing(image_set)


def test_parts_share_no_image_and_follow_the_seed(image_set):
    parts = split(image_set, 3, 10, 20, 30)
    assert sorted([*parts.test, *parts.train, *parts.calibration]) == list(range(60))
    assert split(image_set, 3, 10, 0, 5).test == parts.test != split(image_set, 4, 10, 0, 5).test
    with pytest.raises(InputError, match=r"holds 60 images, 61 are asked for \(10 scored, 20 for probes, 31"):
        split(image_set, 3, 10, 20, 31)


def test_folders_are_classes_where_all_images_lie_in_folders(photos, image_set, tmp_path):
    assert image_set.classes == ["class0", "class1", "class2"]
    assert [image_set.stored(row).label for row in (0, 19, 20, 59)] == [0, 0, 1, 2]
    shutil.copytree(photos / "class0", tmp_path / "one")
    assert ImageSet(str(tmp_path), 32).classes == []  # one folder tells nothing apart
    shutil.copytree(photos / "class1", tmp_path / "two")
    assert ImageSet(str(tmp_path), 32).classes == ["one", "two"]
    shutil.copy(photos / "class2" / "000.png", tmp_path)
    mixed = ImageSet(str(tmp_path), 32)
    assert mixed.classes == [] and mixed.stored(5).label is None


@pytest.mark.parametrize(
    ("number", "size", "sizes"),
    [(9, 4, [4, 5]), (8, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 1, [1, 1, 1]), (3, 2, [3]), (1, 4, [1])],
)
def test_no_last_image_is_left_alone(image_set, number, size, sizes):
    found = list(batches(image_set, range(number), size))
    assert [len(batch.keys) for batch in found] == sizes
    assert [index for batch in found for index in batch.indices] == list(range(number))


def test_images_that_are_evaluated_calibrate_nothing(backbone, image_set):
    evaluated = keys(image_set, [0, 1])
    assert [b.indices for b in batches(image_set, range(4), 4, evaluated)] == [[2, 3]]
    with pytest.raises(InputError, match="none is left that is not evaluated too"):
        calibrate(backbone, batches(image_set, [0, 1], 2, evaluated), "", "", 4, 0)


def test_a_larger_bank_begins_with_the_smaller_one(backbone, image_set, calibration):
    rows = [*range(5, 20), *range(25, 40)]
    small = calibrate(backbone, batches(image_set, rows, 7), "weights", "preprocessing", 3, 0)
    assert torch.equal(small.bank, calibration.bank[:3])
    assert replace(small, bank=calibration.bank).keys == calibration.keys
