from pathlib import Path

import pytest

from pretrain.cluster.attempt import begin, end
from pretrain.cluster.history import Attempt, look_back, read_history
from pretrain.cluster.job_folder import JobFolder
from tests.cluster.jobs import checkpoint, new_job, record


def outcome(folder: JobFolder, lost: bool = False) -> Attempt:
    return look_back(folder, folder.read(), 0, lost)


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return new_job(tmp_path)


def test_finished_and_stopped(folder: JobFolder, tmp_path: Path) -> None:
    for rank in range(4):
        record(folder, rank, 0)
    assert outcome(folder).outcome == "finished"
    record(folder, 0, 75)
    assert outcome(folder).outcome == "stopped"


def test_the_first_cause_counts_and_not_what_follows_from_it(folder: JobFolder) -> None:
    record(folder, 0, 3, line="another rank ended", is_cause=False)
    record(folder, 1, 3, line="another rank ended", is_cause=False)
    record(folder, 2, 1, line="ValueError: x", signature="ValueError at a.py:1", traceback="Traceback")
    record(folder, 3, 1, line="KeyError: y", signature="KeyError at b.py:2")
    found = outcome(folder)
    assert (found.outcome, found.rank, found.node, found.line) == ("crashed", 2, "gpu2", "ValueError: x")
    assert (found.status, found.signature, found.traceback) == (1, "ValueError at a.py:1", "Traceback")


def test_a_killed_rank_is_the_one_that_srun_names_first(folder: JobFolder) -> None:
    folder.batch_log.write_text(
        "srun: error: gpu2: task 3: Killed\nsrun: launch/slurm: terminating\n"
        "srun: error: gpu1: tasks 0-1: Exited with exit code 3\n"
    )
    record(folder, 0, None)
    record(folder, 1, 3, is_cause=False, line="another rank ended")
    record(folder, 2, 75, signature="no save")  # told to end while it failed: nothing was saved
    record(folder, 3, None)
    found = outcome(folder)
    assert (found.outcome, found.rank, found.node, found.signature) == ("killed", 3, "gpu2", "killed")
    assert found.line.startswith("ended without a word (Killed)")


def test_complaints_of_earlier_attempts_do_not_count(tmp_path: Path) -> None:
    folder = new_job(tmp_path)
    folder.batch_log.write_text("srun: error: gpu1: task 1: Killed\n")
    begin(folder, 1, ["gpu1", "gpu2"])
    for rank in range(4):
        record(folder, rank, None if rank == 2 else 3, attempt=1, is_cause=False)
    assert look_back(folder, folder.read(), 1).rank == 2


def test_nothing_has_started(folder: JobFolder) -> None:
    folder.batch_log.write_text("srun: error: gpu1: task 0: Exited with exit code 127\n")
    found = outcome(folder)
    assert (found.outcome, found.signature) == ("crashed", "not started")
    assert found.line == "no process has started (Exited with exit code 127); see logs/batch.log"


def test_bad_machines_are_kept(folder: JobFolder) -> None:
    for rank in range(4):
        record(folder, rank, 3, bad_nodes=["gpu2"], line="gpu2: no GPU is visible")
    found = outcome(folder)
    assert (found.outcome, found.bad_nodes, found.line) == ("bad node", ["gpu2"], "gpu2: no GPU is visible")


def test_an_attempt_without_a_verdict_is_judged_at_the_next_start(tmp_path: Path) -> None:
    folder = new_job(tmp_path)
    record(folder, 0, None)
    assert begin(folder, 1, ["gpu3", "gpu4"]) is None
    (lost,) = read_history(folder)
    assert (lost.number, lost.outcome, lost.nodes) == (0, "lost", ["gpu1", "gpu2"])
    assert begin(folder, 2, []) is None and begin(folder, 3, []) is not None  # the third in a row


def test_a_lost_attempt_that_saved_is_a_stopped_one(folder: JobFolder) -> None:
    record(folder, 0, 75)
    record(folder, 1, None)
    assert outcome(folder, lost=True).outcome == "stopped"


def test_nothing_starts_where_nothing_is_left_to_do(tmp_path: Path) -> None:
    folder = new_job(tmp_path)
    checkpoint(tmp_path, 100)
    verdict = begin(folder, 1, [])
    assert verdict is not None and (verdict.action, verdict.status) == ("end", 0)
    cancelled = new_job(tmp_path / "other")
    cancelled.cancelled.touch()
    verdict = begin(cancelled, 1, [])
    assert verdict is not None and (verdict.action, verdict.status) == ("end", 75)


def test_a_cancelled_attempt_is_not_continued(folder: JobFolder) -> None:
    for rank in range(4):
        record(folder, rank, 75)
    assert end(folder, 0, cancelled=True).action == "end"
    assert read_history(folder)[0].outcome == "cancelled"


def test_what_a_full_disk_has_cut_is_left_out(folder: JobFolder) -> None:
    record(folder, 0, 1, signature="a")
    (folder.attempt(0) / "rank_00001.json").write_text('{"rank": 1, "no')
    end(folder, 0)
    folder.history.write_text(folder.history.read_text() + '{"number": 1, "be')
    assert [attempt.number for attempt in read_history(folder)] == [0]
    assert begin(folder, 2, []) is None
    end(folder, 2)
    assert [attempt.number for attempt in read_history(folder)] == [0, 2]
