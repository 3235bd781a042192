"""Accidents on a real Slurm: the job goes on by itself, and ends with the weights of a run without any."""

import os
import signal
from pathlib import Path

import pytest

from pretrain.cluster.job_folder import newest_job
from tests.slurm.runs import (
    STEPS,
    Shell,
    assert_same_end,
    attempts_of,
    losses,
    pid_of,
    step_of,
    wait_until,
    write_config,
    write_fault,
)
from tests.slurm.virtual_cluster import VirtualCluster

pytestmark = [pytest.mark.slow, pytest.mark.dist]


def test_a_job_trains_as_a_single_process_does(reference: Path, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, shards)
    Shell(None, tmp_path).run("local.py", config, "--procs", "1", "engine.kind=single")
    alone, together = losses(tmp_path / "run"), losses(reference)
    assert len(together) == STEPS and together.keys() == alone.keys()
    assert together == pytest.approx(alone, rel=1e-5)
    assert [attempt.outcome for attempt in attempts_of(reference)] == ["finished"]


def test_usr2_saves_and_goes_on(
    cluster: VirtualCluster, reference: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = Shell(cluster, tmp_path).launch(write_config(tmp_path, shards))
    wait_until(lambda: step_of(run) >= 7, "training")
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait_for(job, "COMPLETED", 120)
    first, second = attempts_of(run)
    assert (first.outcome, second.outcome) == ("stopped", "finished")
    assert first.step == second.step_before > 7  # nothing is lost
    assert_same_end(run, reference)


def test_a_killed_rank_is_named_and_the_job_goes_on(
    cluster: VirtualCluster, reference: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = Shell(cluster, tmp_path).launch(write_config(tmp_path, shards))
    wait_until(lambda: step_of(run) >= 7, "training")
    os.kill(pid_of(newest_job(run), 3), signal.SIGKILL)
    cluster.wait_for(job, "COMPLETED", 120)
    first, second = attempts_of(run)
    assert (first.outcome, first.rank, first.node) == ("killed", 3, first.nodes[1])
    assert first.step >= 5 and second.outcome == "finished"
    assert_same_end(run, reference)


@pytest.mark.drill
def test_an_exception_is_shown_and_the_job_goes_on(
    cluster: VirtualCluster, reference: Path, shards: Path, tmp_path: Path
) -> None:
    run, fault = tmp_path / "run", write_fault(tmp_path / "fault", 0)
    job = Shell(cluster, tmp_path).launch(write_config(tmp_path, shards, setup=[fault]))
    cluster.wait_for(job, "COMPLETED", 120)
    first, second = attempts_of(run)
    assert (first.outcome, first.rank, first.step, second.outcome) == ("crashed", 1, 5, "finished")
    assert first.line == "RuntimeError: this step fails"
    assert "in train_step" in first.traceback
    assert "RuntimeError: this step fails" in newest_job(run).batch_log.read_text()
    assert_same_end(run, reference)


@pytest.mark.drill
def test_the_same_failure_twice_ends_the_job(cluster: VirtualCluster, shards: Path, tmp_path: Path) -> None:
    run, fault = tmp_path / "run", write_fault(tmp_path / "fault", 0, 1, 2, 3)
    shell = Shell(cluster, tmp_path)
    job = shell.launch(write_config(tmp_path, shards, setup=[fault]))
    cluster.wait_for(job, "FAILED", 120)
    first, second = attempts_of(run)
    assert (first.rank, second.rank, second.step_before) == (1, 1, 5)
    assert second.decision == "end: the same failure came twice without a new checkpoint between"
    shown = shell.run("jobs.py", "status", run)
    assert "failed" in shown and f"attempt 1: rank 1 on {second.node}: RuntimeError: this step fails" in shown
