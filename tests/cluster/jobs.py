"""Job folders as launchers and processes leave them."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from pretrain.cluster.history import Attempt, write_begin
from pretrain.cluster.job_folder import Job, JobFolder, Limits, new_job_folder
from pretrain.records import Record

LIMITS = Limits(max_restarts=10, max_crashes=3, max_bad_nodes=1)


def new_job(run_dir: Path, **facts: object) -> JobFolder:
    """A job of 2 machines x 2 processes, whose first attempt has begun."""
    folder = new_job_folder(run_dir)
    job = Job("slurm", str(run_dir), str(run_dir / "code"), 4, 2, 100, 8, "", LIMITS)
    folder.write(replace(job, **facts))
    write_begin(folder, folder.read(), 0, ["gpu1", "gpu2"])
    return folder


def record(folder: JobFolder, rank: int, status: int | None, attempt: int = 0, **facts: object) -> None:
    """What a process has written: None stands for one that was killed."""
    now = time.time()
    ended = None if status is None else now + rank
    one = Record(rank, f"gpu{rank // 2 + 1}", 100 + rank, now, **{"ended": ended, "status": status, **facts})
    (folder.attempt(attempt) / f"rank_{rank:05}.json").write_text(json.dumps(asdict(one)))


def checkpoint(run_dir: Path, step: int) -> None:
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "COMPLETE").touch()


def attempt(number: int, outcome: str, step_before: int = 0, step: int = 0, **facts: object) -> Attempt:
    return Attempt(number, 0.0, 1.0, ["gpu1", "gpu2"], step_before, step, outcome, **facts)
