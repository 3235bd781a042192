"""The study of randomized heads keeps its runs apart from those of other settings; it is not run here."""

import importlib
import sys

import pytest

from pretrain.errors import InputError
from tests.benchmarks.running import ROOT


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("rmlp_study")


@pytest.fixture
def parsed(study, tmp_path, monkeypatch):
    """Options of a study in a folder that has the copies already."""

    def parse(*arguments):
        command = ["rmlp_study.py", "--shards", tmp_path / "photos", "--work", tmp_path / "work", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        options = study.parse()
        for split, number in (("train", options.train_images), ("test", options.test_images)):
            folder = options.work / f"corrupted_{options.severity}_{split}_{number}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "complete").touch()
        return options

    return parse


def test_runs_of_other_settings_are_not_taken_for_these(study, parsed, monkeypatch):
    monkeypatch.setattr(study, "train", lambda folder, config, steps, settings: folder)
    monkeypatch.setattr(study.Judge, "__call__", lambda self, export: {})
    options = parsed("--seeds", 0)
    study.refuse_other_study(options)  # of a new folder
    study.study(options)
    for same in (("--seeds", 1, 2), ("--only", "MLP")):
        study.refuse_other_study(parsed(*same))
    for other, name in (("--severity", 5), "--severity"), (("--first-steps", 200), "--first-steps"):
        with pytest.raises(InputError, match=f"holds a study with other {name}; choose another folder"):
            study.refuse_other_study(parsed(*other))


def test_a_setting_that_there_is_not_is_refused(parsed):
    with pytest.raises(InputError, match="--only: 'RMLP a = 7' is none of: MLP; "):
        parsed("--only", "RMLP a = 7")
