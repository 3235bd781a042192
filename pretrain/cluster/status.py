"""Where the jobs of runs stand, from their folders and Slurm's word on those that it still knows."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.cluster import scheduler
from pretrain.cluster.checks import is_alive
from pretrain.cluster.history import Attempt, begun, look_back, read_history
from pretrain.cluster.job_folder import Job, JobFolder, job_folders, newest_job
from pretrain.errors import InputError
from pretrain.ranks import expand_hosts
from pretrain.records import read_records
from pretrain.run.checkpoint_folder import newest_step

TAIL_BYTES = 65_536  # of metrics.jsonl, which holds many lines


@dataclass(frozen=True)
class Status:
    """One run and its newest job."""

    run: str
    job_id: str
    state: str  # waiting, running, ending, finished, failed, stopped, cancelled, lost, unknown
    restarts: int
    step: int  # of the newest metrics, or checkpoint
    steps: int
    images_per_s: float | None  # of all devices
    loss: float | None
    seconds_left: float | None  # at that speed
    nodes: list[str]
    followers: list[str]  # jobs that wait for this one
    last_error: str  # of the last attempt that failed, and who failed


def status(run_dir: Path) -> Status:
    """Where a run stands.

    Raises:
        InputError: no job was started in the folder.
    """
    folder, *followers = _current_jobs(run_dir)
    job, history = folder.read(), read_history(folder)
    alive = _alive(job)
    facts = scheduler.job_facts(job.job_id) if alive and job.kind == "slurm" else {}
    attempts = begun(folder)
    if alive is False:
        history += _unjudged(folder, job, history, attempts)
    metrics = _metrics(Path(job.run_dir))
    step = max(metrics.get("step", 0), newest_step(Path(job.run_dir) / "checkpoints"))
    speed = metrics.get("images_per_s")
    left = max(job.steps - step, 0) * job.global_batch_size / speed if speed else None
    failures = [attempt for attempt in history if attempt.line and attempt.outcome not in QUIET]
    return Status(
        run=str(run_dir),
        job_id=job.job_id,
        state=_state(folder, job, alive, facts, history),
        restarts=max(attempts, default=0),
        step=step,
        steps=job.steps,
        images_per_s=speed,
        loss=metrics.get("loss/total"),
        seconds_left=left,
        nodes=_nodes(facts, history, folder, attempts),
        followers=[follower.read().job_id for follower in followers],
        last_error=_error(failures[-1]) if failures else "",
    )


QUIET = ("finished", "stopped", "cancelled")  # outcomes that are no error


def _alive(job: Job) -> bool | None:
    """Whether a job waits or runs; None where Slurm does not answer."""
    try:
        return is_alive(job)
    except InputError:
        return None


def _current_jobs(run_dir: Path) -> list[JobFolder]:
    """The jobs that wait or run, of which the first is followed by the others; else the last one."""
    newest = newest_job(run_dir)
    return [folder for folder in job_folders(run_dir) if _alive(folder.read())] or [newest]


def _state(
    folder: JobFolder, job: Job, alive: bool | None, facts: dict[str, str], history: Sequence[Attempt]
) -> str:
    """In one word, with Slurm's reason where it lets the job wait."""
    if newest_step(Path(job.run_dir) / "checkpoints") >= job.steps and not alive:
        return "finished"
    if alive:
        return _alive_state(facts)
    if folder.cancelled.exists():
        return "cancelled"
    if alive is None and not (history and history[-1].decision.startswith("end")):
        return "unknown (Slurm does not answer)"
    if not history:
        return "lost"
    outcome = history[-1].outcome
    return outcome if outcome in (*QUIET, "lost") else "failed"


def _alive_state(facts: dict[str, str]) -> str:
    state = facts.get("JobState", "RUNNING")
    if state in scheduler.PENDING:
        reason = facts.get("Reason", "None")
        return "waiting" if reason in ("None", "(null)") else f"waiting ({reason})"
    return "ending" if state == "COMPLETING" else state.lower()


def _unjudged(folder: JobFolder, job: Job, history: Sequence[Attempt], attempts: list[int]) -> list[Attempt]:
    """The last attempt of a job that is over, where nobody was left to judge it."""
    judged = {attempt.number for attempt in history}
    return [look_back(folder, job, number, lost=True) for number in attempts if number not in judged]


def _nodes(
    facts: dict[str, str], history: Sequence[Attempt], folder: JobFolder, attempts: list[int]
) -> list[str]:
    """The machines: those of the running attempt, else of the last one."""
    listed = facts.get("NodeList", "(null)")
    if listed not in ("(null)", ""):
        return expand_hosts(listed)
    if attempts and not history:
        return sorted({record.node for record in read_records(folder.attempt(attempts[-1])).values()})
    return history[-1].nodes if history else []


def _error(attempt: Attempt) -> str:
    who = f"rank {attempt.rank} on {attempt.node}: " if attempt.rank is not None else ""
    return f"attempt {attempt.number}: {who}{attempt.line}"


def _metrics(run_dir: Path) -> dict[str, Any]:
    """The newest values of each metric among the last lines."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        found: dict[str, Any] = {}
        for line in file.read().decode(errors="replace").splitlines():
            found |= _values(line)
    return found


def _values(line: str) -> dict[str, Any]:
    """The numbers of a line; none of one that is cut off."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, int | float) and math.isfinite(v)}
