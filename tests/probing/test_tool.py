"""tools/probe.py from shards to report: what is fitted on what, resumed, refused."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pretrain.analysis.taps import Place, places, pooled_features
from pretrain.data.writer import PackedSample, write_shards
from pretrain.export import write_export
from pretrain.probing import suite
from pretrain.probing.store import open_features
from tests.analysis.test_page import pictures_of, stands_alone
from tests.scripts import runner
from tests.small import random_backbone, small_model

MODEL = small_model(img_size=24, layer_scale=None, num_register_tokens=2)


@pytest.fixture
def probe(capsys, monkeypatch):
    return runner("probe", capsys, monkeypatch)


def write_model(path, model=MODEL):
    return write_export(path, random_backbone(model, 0.1).state_dict(), model, {})


def picture(label: int, number: int) -> bytes:
    """A coloured square of one of three kinds, with noise."""
    drawn = np.random.default_rng([label, number]).integers(0, 60, (24, 24, 3))
    drawn[..., label] += 120
    file = io.BytesIO()
    Image.fromarray(drawn.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Weights, and shards of three classes with a patient for each pair of images."""
    folder = tmp_path_factory.mktemp("probing")
    write_model(folder / "vit.safetensors")
    for name, start, number in (("train", 0, 90), ("test", 500, 45), ("other", 900, 60)):
        samples = [
            PackedSample(
                f"{name}{i}", "png", picture(i % 3, start + i), i % 3, {"patient": f"{name}{i // 2}"}
            )
            for i in range(number)
        ]
        write_shards(samples, folder, name, 40)
    return folder


def command(data, out, *further):
    shards = ("--train", data / "train-*.tar", "--test", data / "test-*.tar")
    return (data / "vit.safetensors", *shards, "--out", out, "--C", 0.1, 1, *further)


def rows_of(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()[1:]]


def test_every_place_is_probed_and_the_page_says_where(data, probe, tmp_path):
    further = ("--controls", "--corrupt", "contrast:5", "--shift", f"sketch={data / 'other-*.tar'}")
    status, out, err = probe(*command(data, tmp_path, *further, "--protocol", "both"))
    assert status == 0, err
    rows = rows_of(tmp_path)
    plain = [row for row in rows if row["control"] == "none"]
    assert len(plain) == 3 * 8 * 2  # fitted on three sets; eight points of two blocks
    assert len(rows) - len(plain) == 3 * 2 * (2 + 2 + 1)
    transfer = [row for row in rows if row["protocol"] == "transfer"]
    assert all(list(row["test"]) == ["test", "sketch", "contrast:5"] for row in transfer)
    assert {row["width"] for row in rows if row["point"] == "Act"} == {24, 96}
    assert {row["width"] for row in rows if row["control"] == "random features"} == {96}
    assert all(row["val"] == max(row["val_by_choice"].values()) for row in rows)
    assert all(low <= mean <= high for row in rows for mean, low, high in row["test"].values())
    assert max(row["val"] for row in rows) > 90  # three colours
    html = (tmp_path / "report.html").read_text()
    assert stands_alone(html) and len(pictures_of(html)) == 4 + 2 + 2
    best = max((row for row in plain if row["protocol"] == "transfer"), key=lambda row: row["val"])
    assert f"{best['val']:.1f} % on validation" in out and "train (transfer): probe block " in out
    figures = json.loads((tmp_path / "report.figures.json").read_text())
    assert len(figures["rows"]) == len(rows) and len(figures["shifts"]) == 3


def test_the_paper_s_probe_is_the_one_of_scikit_learn(data, probe, tmp_path):
    chosen = ("--blocks", 1, "--points", "Act", "--solver", "sklearn", "--C", 1, "--pools", "all_mean")
    status, _, err = probe(*command(data, tmp_path, *chosen))
    assert status == 0, err
    row = rows_of(tmp_path)[0]
    sets = {}
    for name in ("train", "test"):
        folder = tmp_path / "features" / name
        found = open_features(folder, json.loads((folder / "complete.json").read_text())["key"])
        sets[name] = found.features(Place(1, "Act"), "all_mean").read(), found.labels
    halves = suite.split(sets["train"][1], 0.2, 0)
    rows = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, (x, _) in sets.items()}
    scaler = StandardScaler().fit(rows["train"][halves.train])
    fit, val = (scaler.transform(rows["train"][chosen]) for chosen in (halves.train, halves.validation))
    labels = sets["train"][1]
    model = LogisticRegression(C=1.0, max_iter=5000).fit(fit, labels[halves.train])
    assert row["val"] == pytest.approx(100 * model.score(val, labels[halves.validation]))
    expected = 100 * model.score(scaler.transform(rows["test"]), sets["test"][1])
    assert row["test"]["test"][0] == pytest.approx(expected)


def test_features_on_the_disk_are_those_of_the_model(data, probe, tmp_path):
    assert probe(*command(data, tmp_path, "--solver", "ridge", "--size", 16))[0] == 0
    folder = tmp_path / "features" / "test"
    found = open_features(folder, json.loads((folder / "complete.json").read_text())["key"])
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(picture(i % 3, 500 + i)))) for i in range(4)])
    resized = [np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BICUBIC)) for p in pixels]
    images = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = pooled_features(random_backbone(MODEL, 0.1), (images - mean) / std, places(MODEL))
    for place, pooled in expected.items():
        cls, patches = (found.features(place, pool, np.arange(4)).read() for pool in ("cls", "patch_mean"))
        np.testing.assert_allclose(cls, pooled.cls, atol=1e-5)
        np.testing.assert_allclose(patches, pooled.patch_mean, atol=1e-5)
        both = found.features(place, "cls+patch_mean", np.arange(4)).read()
        np.testing.assert_array_equal(both, np.concatenate([cls, patches], axis=1))
        all_mean = found.features(place, "all_mean", np.arange(4)).read()
        np.testing.assert_allclose(all_mean, (cls + 4 * patches) / 5, rtol=1e-6)
    assert found.labels.tolist() == [i % 3 for i in range(45)]
    picked = found.features(Place(0, "FC1"), "cls", np.array([3, 17, 44])).read()
    np.testing.assert_array_equal(picked, found.features(Place(0, "FC1"), "cls").read()[[3, 17, 44]])


def test_a_killed_run_goes_on_without_fitting_anything_again(data, probe, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert probe(*command(data, whole))[0] == 0
    added, add = [], suite.Rows.add

    def stopped(self, row):
        if len(added) == 5:
            raise KeyboardInterrupt
        added.append(row)
        add(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(suite.Rows, "add", stopped)
        assert probe(*command(data, parts))[0] == 130
    with (parts / "rows.jsonl").open("a") as file:
        file.write('{"fitted_on": "tr')  # a line that was cut off
    features = {path: path.stat().st_mtime_ns for path in (parts / "features").rglob("*.f32")}
    fitted = []
    monkeypatch.setattr(
        suite, "run", lambda task, specs, *rest: fitted.extend(specs) or run(task, specs, *rest)
    )
    run = sys.modules["pretrain.probing.experiment"].run
    assert probe(*command(data, parts))[0] == 0
    assert len(fitted) == 16 - 5
    assert {path: path.stat().st_mtime_ns for path in features} == features
    by_place = {(row["block"], row["point"]): row for row in rows_of(parts)}
    assert by_place == {(row["block"], row["point"]): row for row in rows_of(whole)}


def test_groups_stay_on_one_side_and_a_leak_is_refused(data, probe, tmp_path):
    seen = []
    original = suite.split

    def split(labels, share, seed, groups=None):
        halves = original(labels, share, seed, groups)
        sides = [{groups[i] for i in rows} for rows in (halves.train, halves.validation)]
        seen.append(sides[0] & sides[1])
        return halves

    few = ("--blocks", 1, "--points", "RC2", "--group-key", "patient")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "split", split)
        assert probe(*command(data, tmp_path / "a", *few))[0] == 0
    assert seen == [set()]
    leak = ("--shift", f"again={data / 'train-*.tar'}")
    status, _, err = probe(*command(data, tmp_path / "b", *few, *leak))
    assert status == 2 and err.count("\n") == 1 and "train0" in err


@pytest.mark.parametrize("solver", ["ridge", "knn", "torch"])
def test_every_solver_tells_three_colours_apart(solver, data, probe, tmp_path):
    status, _, err = probe(*command(data, tmp_path, "--blocks", 0, "--points", "LN1", "--solver", solver))
    assert status == 0, err
    row = rows_of(tmp_path)[0]
    assert row["solver"] == solver and row["test"]["test"][0] > 90


def test_wrong_input_is_one_line(data, probe, tmp_path):
    write_model(tmp_path / "grey.safetensors", replace(MODEL, in_channels=1))
    base = command(data, tmp_path / "out")
    for arguments, words in (
        ((*base, "--blocks", 7), "--blocks: 7 must be from 0 to 1"),
        ((*base, "--points", "MHA_LS"), "the model has none of MHA_LS"),
        ((*base, "--corrupt", "rain:3"), "rain"),
        ((*base, "--corrupt", "fog:3", "fog:3"), "fog:3 is there twice"),
        ((*base, "--shift", "fog_3=x.tar", "--corrupt", "fog:3"), "fog_3 is there twice"),  # one folder
        ((*base, "--shift", "a/b=x.tar"), "must be NAME=SHARDS"),
        ((*base, "--shift", "x=none.tar"), "none.tar"),
        ((*base, "--protocol", "pretrain"), "give --shift or --corrupt"),
        ((*base, "--val-share", 1), "--val-share: 1 must be between 0 and 1"),
        ((*base, "--size", 20), "not a multiple of the patch size 8"),
        ((*base, "--size", 0), "--size: must be at least 1"),
        ((*base, "--device", "nowhere"), "nowhere: this machine, or its torch, has no such device"),
        ((*base, "--C", 0), "above 0"),
        ((*base, "--C", "nan"), "--C: must be above 0 and finite"),
        ((*base, "--group-key", "hospital"), "has no 'hospital' in a .json member"),
        ((tmp_path / "grey.safetensors", *base[1:]), "takes 1 channels"),
        ((tmp_path / "missing.pth", *base[1:]), "missing.pth"),
    ):
        status, _, err = probe(*arguments)
        assert status == 2 and words in err and err.count("\n") == 1, (arguments, err)


def test_other_settings_are_refused_for_the_same_folder(data, probe, tmp_path):
    few = ("--blocks", 0, "--points", "LN1")
    assert probe(*command(data, tmp_path, *few))[0] == 0
    status, _, err = probe(*command(data, tmp_path, *few, "--seed", 3))
    assert status == 2 and "is of a run with other sets, seed; choose another --out" in err


def test_a_model_that_computes_something_else_from_the_same_tensors_is_another_one(data, probe, tmp_path):
    few = ("--blocks", 0, "--points", "LN1")
    assert probe(*command(data, tmp_path, *few))[0] == 0
    registers = write_model(tmp_path / "registers.safetensors", replace(MODEL, register_neurons=[[0, 3]]))
    _, *rest = command(data, tmp_path, *few)
    for arguments in ((registers, *rest), (*command(data, tmp_path, *few), "--num-heads", 3)):
        status, _, err = probe(*arguments)
        assert status == 2 and "is of a run with other model, sets; choose another --out" in err


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"[1]\n{}\n", b'{"asked": 3}\n', b'{"asked": {}}\n[1]\n'])
def test_what_is_no_record_of_probes_is_left_alone(content, data, probe, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    status, _, err = probe(*command(data, tmp_path))
    assert status == 2 and "rows.jsonl: is no record of probes" in err and err.count("\n") == 1
    assert (tmp_path / "rows.jsonl").read_bytes() == content


def test_a_set_that_is_too_small_to_be_split_is_named(data, probe, tmp_path):
    samples = [PackedSample(f"{i}", "png", picture(i, i), i, {}) for i in range(3)]
    write_shards(samples, tmp_path, "few", 9)
    command_of_few = (
        *command(data, tmp_path / "out", "--blocks", 0, "--points", "RC2"),
        *("--shift", f"few={tmp_path / 'few-*.tar'}", "--protocol", "pretrain"),
    )
    status, _, err = probe(*command_of_few)
    assert status == 2 and "few: 3 images: too few images for 20% validation" in err
    transfer = (*command_of_few[:-1], "transfer")  # it can be tested on, but lies nowhere
    status, _, err = probe(*transfer)
    assert status == 0, err
    shifts = json.loads((tmp_path / "out" / "report.figures.json").read_text())["shifts"]
    assert [row["set"] for row in shifts] == ["test", "few"] and shifts[1]["Frechet distance"] == "-"
