"""A minute of damaged inputs, always the same ones; `make fuzz` goes on with others."""

import os
from pathlib import Path

import pytest

from tests.fuzz.campaign import FAILED, Campaign
from tests.fuzz.cases import REFUSED, WORKED, outcome, write_case
from tests.fuzz.subjects import SUBJECTS

CASES = {
    **{"config": 250, "weights": 500, "checkpoints": 200, "shards": 1_800},
    **{"images": 3_500, "dicom": 450, "nifti": 350, "parquet": 500},
}
REPEATABLE = ("checkpoints", "shards", "dicom", "nifti", "parquet")  # their examples are made quickly


@pytest.mark.filterwarnings("ignore")  # damaged images make their parsers warn
@pytest.mark.parametrize("kind", SUBJECTS)
def test_damaged_input_works_or_is_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    campaign = Campaign(kind, seed=1, failures=tmp_path)
    for files in campaign.examples:
        write_case(tmp_path / "whole", files)
        assert outcome(campaign.subject, tmp_path / "whole") == WORKED  # else all of it would be refused
    for number in range(CASES[kind]):
        campaign.run(number)
    assert campaign.counts[FAILED] == 0, campaign.reasons
    assert campaign.counts[WORKED]
    assert campaign.counts[REFUSED] or kind == "images"  # of which a damaged one is a corrupt sample


@pytest.mark.parametrize("kind", REPEATABLE)
def test_a_case_depends_on_its_seed_and_number_alone(kind: str, tmp_path: Path) -> None:
    first, again, other = (Campaign(kind, seed, tmp_path) for seed in (3, 3, 4))
    assert [first.files(i) for i in range(20)] == [again.files(i) for i in reversed(range(20))][::-1]
    assert first.files(0) != other.files(0)


def write_outside(folder: Path) -> str:
    (folder.parent / "harm").write_text("harm")
    return WORKED


def start_a_program(folder: Path) -> str:
    os.system("true")
    return WORKED


def raise_what_nobody_expects(folder: Path) -> str:
    raise KeyError(folder)


@pytest.mark.parametrize("look", [write_outside, start_a_program, raise_what_nobody_expects])
def test_what_no_input_may_do_is_a_failure_and_is_kept(look, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(SUBJECTS, "images", type(SUBJECTS["images"])(SUBJECTS["images"].examples, look))
    campaign = Campaign("images", 0, tmp_path)
    assert campaign.run(5) == FAILED
    assert (tmp_path / "images-0-5/picture.img").read_bytes() == campaign.files(5)["picture.img"]
    assert (tmp_path / "images-0-5/fault.json").exists()
