"""The folder of one job, and what is written in it.

RUN_DIR/code/3f2a9c01d4b7/       the code that jobs run, a copy
RUN_DIR/jobs/20260805-141503/    one job: a submission and all its restarts
    job.json                     how it was started, and its limits
    config.yaml                  complete, with absolute paths
    logs/                        batch.log, and r2_rank00003.log: rank 3 after the second restart
    attempts/2/                  what the processes wrote down about themselves (`records.py`)
    attempts.jsonl               a line per ended attempt
    cancelled                    there when a person has cancelled the job
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pretrain.errors import InputError

JOB = "job.json"
Kind = Literal["slurm", "local", "debug", "torchrun"]


@dataclass(frozen=True)
class Limits:
    """How often a job may be started again: see section cluster of the configuration."""

    max_restarts: int
    max_crashes: int
    max_bad_nodes: int


@dataclass(frozen=True)
class Job:
    """How a job was started: the contents of job.json."""

    kind: Kind
    run_dir: str
    code: str  # folder of the copy
    world_size: int
    nodes: int
    steps: int  # of the whole run
    global_batch_size: int
    exclude: str  # machines that the configuration excludes
    limits: Limits
    submitted: float = field(default_factory=time.time)  # seconds since 1970
    job_id: str = ""  # Slurm's; of the process that watches over the job elsewhere
    started: str = ""  # that process's start, as `processes.started` tells it
    host: str = ""  # its machine


class JobFolder:
    """Where the parts of a job lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.logs = path / "config.yaml", path / "logs"
        self.batch_log = self.logs / "batch.log"
        self.history, self.cancelled = path / "attempts.jsonl", path / "cancelled"

    def attempt(self, number: int) -> Path:
        """The folder of an attempt's records."""
        return self.path / "attempts" / str(number)

    def rank_log(self, attempt: int, rank: int) -> Path:
        """The output of one process of an attempt."""
        return self.logs / f"r{attempt}_rank{rank:05}.log"

    def read(self) -> Job:
        """The contents of job.json.

        Raises:
            InputError: there is none, or it is not ours.
        """
        try:
            content = json.loads((self.path / JOB).read_text())
            return Job(**{**content, "limits": Limits(**content["limits"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path / JOB}: cannot be read ({error})") from error

    def write(self, job: Job) -> None:
        """Write job.json in one step."""
        temporary = self.path / f"{JOB}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(asdict(job), indent=1) + "\n")
        temporary.replace(self.path / JOB)

    def note_start(self, **facts: str) -> None:
        """Add to job.json what is known only after the start: job_id, started, host."""
        self.write(replace(self.read(), **facts))  # type: ignore[arg-type]


def new_job_folder(run_dir: Path) -> JobFolder:
    """Make the folder of a new job, named after the time."""
    name = time.strftime("%Y%m%d-%H%M%S")
    for end in ("", *(f"-{number}" for number in range(2, 100))):
        folder = JobFolder(run_dir / "jobs" / (name + end))
        try:
            folder.logs.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise InputError(f"{run_dir / 'jobs'}: too many jobs start in one second")


def job_folders(run_dir: Path) -> list[JobFolder]:
    """The jobs of a run, oldest first."""
    found = [path.parent for path in (run_dir / "jobs").glob(f"*/{JOB}")]
    return [JobFolder(path) for path in sorted(found, key=_place)]


def newest_job(run_dir: Path) -> JobFolder:
    """The last job of a run.

    Raises:
        InputError: there is none.
    """
    folders = job_folders(run_dir)
    if not folders:
        raise InputError(f"{run_dir}: no job was started here; name the folder of a run (run.dir)")
    return folders[-1]


def _place(path: Path) -> tuple[str, int]:
    day, _, rest = path.name.partition("-")
    clock, _, number = rest.partition("-")
    return f"{day}-{clock}", int(number or 1) if (number or "1").isdigit() else 1
