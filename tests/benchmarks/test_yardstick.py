"""The yardstick's bookkeeping, and one whole run of toy length."""

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config.load import load_config, save_config
from pretrain.errors import InputError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
RECIPES = ("demo.yaml", "demo_rmlp.yaml")
TOY = (
    *("optim.warmup_steps=1", "optim.global_batch_size=8", "data.group_size=8", "data.workers=0"),
    *("model.depth=1", "model.embed_dim=24", "checkpoint.every=1", "log.tensorboard=false"),
)


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("yardstick_report")


@pytest.fixture(scope="module")
def yardstick(report):
    return importlib.import_module("yardstick")


# -- judging


def outcome(report, *last: tuple[float, float], as_original: bool = True):
    curves = {seed: report.Curve({0: (40.0, 45.0), 300: score}, [100.0]) for seed, score in enumerate(last)}
    return report.Outcome("scikit-learn digits", RECIPES, 8, [], 300, 60, curves, curves, as_original)


@pytest.mark.parametrize(
    ("last", "passed"),
    [
        ([(75.2, 62.3)], True),
        ([(75.0, 62.3)], False),  # CLS: 2.1 points below
        ([(75.2, 62.1)], False),  # mean patch: 2.1 points below
        ([(70.0, 70.0), (80.4, 60.0), (75.5, 60.0)], True),  # the mean counts
    ],
)
def test_the_mean_over_the_seeds_is_held_against_the_original(report, last, passed):
    result = outcome(report, *last)
    assert report.passed(result) is passed
    assert report.figures(result)["passed"] is passed
    assert ("NOT reached" in report.markdown(result)) is not passed


def test_other_data_is_not_compared(report):
    result = outcome(report, (10.0, 10.0), as_original=False)
    assert report.passed(result)
    assert report.figures(result)["passed"] is None
    assert "original" not in report.markdown(result)


def test_the_table_has_seeds_means_and_the_original(report):
    text = report.markdown(outcome(report, (70.0, 60.0), (80.0, 61.0)))
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:-1]]
        for cells in (r.split("|") for r in text.splitlines())
        if len(cells) > 2
    }
    assert rows["after"][:4] == ["CLS, seed 0", "CLS, seed 1", "CLS, mean", "CLS, original"]
    assert rows["300 steps"] == ["70.0", "80.0", "75.0", "77.1", "60.0", "61.0", "60.5", "64.2"]
    assert rows["60 more, randomized heads"][2::4] == ["75.0", "60.5"]


def test_the_drawing_is_a_drawing(report):
    root = ElementTree.fromstring(report.svg(outcome(report, (70.0, 60.0), (80.0, 61.0))))
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * (2 + 1 + 1 + 1)  # two panels: seeds, mean, original, randomized heads
    x, y = map(float, lines[2].get("points", "").split()[-1].split(","))  # the mean after 300 of 360 steps
    assert (x, y) == (pytest.approx(report.WIDTH * 300 / 360, abs=0.1), pytest.approx(report.HEIGHT / 4))


# -- running


def phase(yardstick, folder: Path):
    options = yardstick.parse(["--work", str(folder), "--steps", "4", "--rmlp-steps", "0", *TOY])
    (first,) = yardstick.phases(options, 0)
    return first


def pretend(first, steps: tuple[int, ...]) -> None:
    """What a run leaves that is finished, but with k-NN scores at these steps only."""
    first.export.parent.mkdir(parents=True)
    first.export.touch()
    save_config(load_config(first.config, first.settings), first.folder / "config.yaml")
    lines = [{"step": step, "knn/cls": 50.0 + step, "knn/patch_mean": 40.0} for step in steps]
    (first.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_finished_seed_is_not_run_again(yardstick, tmp_path, monkeypatch):
    monkeypatch.setattr(yardstick, "_train", None)
    first = phase(yardstick, tmp_path)
    pretend(first, (0, 4))
    assert yardstick.complete(first).last == (54.0, 40.0)
    with pytest.raises(InputError, match=r"other settings \(run.steps: 4 -> 5\); set another --work"):
        yardstick.complete(replace(first, steps=5))


def test_warnings_are_counted(yardstick, report, tmp_path):
    first = phase(yardstick, tmp_path)
    pretend(first, (0, 4))
    text = "step 2: WARNING: all on one prototype\nstep 4/4  loss 1.0\nstep 4: WARNING: not finite\n"
    first.folder.with_suffix(".log").write_text(text)
    curve = yardstick.read_curve(first.folder)
    result = report.Outcome("digits", RECIPES, 8, [], 4, 0, {0: curve, 1: curve}, {}, False)
    assert report.figures(result)["warnings"] == 4
    assert "Warnings that the runs printed: 4." in report.markdown(result)


def test_an_unfinished_seed_is_continued(yardstick, tmp_path, monkeypatch):
    first = phase(yardstick, tmp_path)
    pretend(first, (0, 2))
    started = []
    monkeypatch.setattr(yardstick, "_train", started.append)
    with pytest.raises(
        InputError, match=r"its last scores are missing; remove .*step_00000004 and start again"
    ):
        yardstick.complete(first)
    assert started == [first]


def test_a_failed_run_ends_the_yardstick_with_its_status(yardstick, tmp_path):
    first = phase(yardstick, tmp_path)
    with pytest.raises(SystemExit) as ended:
        yardstick.complete(replace(first, overrides=["no.such=1"]))
    assert ended.value.code == 2
    assert "no: no such key" in (tmp_path / "seed_0.log").read_text()


def test_other_shards_are_trained_and_judged(yardstick, tmp_path):
    shards = tmp_path / "photos"
    options = yardstick.parse(["--shards", str(shards), "--patch-size", "4", "--seeds", "7", "a.b=1"])
    assert options.work == Path("runs/yardstick_photos")
    assert options.seeds == [7]
    settings = yardstick.phases(options, 7)[0].settings
    assert {f"data.shards={shards}/train-*.tar", f"log.knn.test={shards}/test-*.tar"} < set(settings)
    assert {"model.patch_size=4", "run.seed=7", "a.b=1"} < set(settings)


def test_a_whole_run_and_a_second_start(yardstick, tmp_path, capfd):
    lengths = ["--steps", "4", "--rmlp-steps", "2", "--knn-every", "2", "--results", str(tmp_path / "r.md")]
    arguments = ["--work", str(tmp_path), "--seeds", "3", *lengths, *TOY]
    assert yardstick.main(arguments) == 0
    first = capfd.readouterr().out
    figures = json.loads(first.splitlines()[-1])
    scores = figures["mlp_by_step_cls_and_patch_mean_percent"]["3"]
    assert list(scores) == ["0", "2", "4"]
    assert scores["4"] != scores["0"]
    assert list(figures["rmlp_cls_and_patch_mean_percent"]) == ["3"]
    assert "![k-NN accuracy by step](r.svg)" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.svg").exists()

    script = [sys.executable, str(FOLDER / "yardstick.py"), *arguments]
    again = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "-m pretrain" in first and "-m pretrain" not in again
    assert json.loads(again.splitlines()[-1]) == figures
