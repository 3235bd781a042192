import json
from pathlib import Path

import pytest

from pretrain.cluster.attempt import end
from pretrain.cluster.status import status
from tests.cluster.jobs import checkpoint, new_job, record


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that prints what stands in a file, in the place of Slurm's."""
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\ncat {tmp_path}/said >&2\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    (tmp_path / "said").write_text("slurm_load_jobs error: Invalid job id specified\n")
    return tmp_path / "said"


def write_metrics(run: Path) -> None:
    lines = [{"step": 4, "loss/total": 9.5, "images_per_s": 16.0}, {"step": 5, "knn/cls": 40.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')


def test_a_job_that_slurm_has_forgotten(slurm: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = new_job(run, job_id="7")
    write_metrics(run)
    for rank in range(4):
        record(folder, rank, 1, line="ValueError: x", signature="a")
    seen = status(run)
    assert (seen.state, seen.step, seen.steps, seen.loss, seen.images_per_s) == ("failed", 5, 100, 9.5, 16.0)
    assert seen.seconds_left == 95 * 8 / 16
    assert seen.last_error == "attempt 0: rank 0 on gpu1: ValueError: x"
    folder.cancelled.touch()
    assert status(run).state == "cancelled"
    checkpoint(run, 100)
    assert status(run).state == "finished"


def test_slurm_does_not_answer(slurm: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = new_job(run, job_id="7")
    slurm.write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    assert status(run).state == "unknown (Slurm does not answer)"
    for rank in range(4):
        record(folder, rank, 75)
    end(folder, 0, cancelled=True)  # the last word on the job stands in its folder
    assert status(run).state == "cancelled"
