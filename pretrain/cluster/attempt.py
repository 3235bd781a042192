"""What the batch script asks at the beginning and at the end of each attempt.

    python -m pretrain.cluster.attempt begin|end JOB_FOLDER

An answer is the exit status that the script is to end with; no answer to `begin` means: go on. `end` starts
the job again where that has sense. What is decided, and why, goes to stderr, the log of the batch script.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pretrain.cluster import scheduler
from pretrain.cluster.history import Attempt, append, begun, look_back, read_history, write_begin
from pretrain.cluster.job_folder import Job, JobFolder
from pretrain.cluster.script import ATTEMPT
from pretrain.cluster.verdict import Verdict, excluded, judge
from pretrain.command_line import STOPPED, exit_status
from pretrain.errors import InputError
from pretrain.ranks import expand_hosts
from pretrain.run.checkpoint_folder import newest_step


def begin(folder: JobFolder, number: int, nodes: list[str]) -> Verdict | None:
    """Start an attempt, or say why there is none.

    An attempt before it that ended without a verdict, because its first machine failed, gets it now.
    """
    job = folder.read()
    if folder.cancelled.exists():
        return Verdict("end", STOPPED, "cancelled")
    if newest_step(Path(job.run_dir) / "checkpoints") >= job.steps:
        return Verdict("end", 0, f"finished at step {job.steps}")
    judged = {attempt.number for attempt in read_history(folder)}
    for lost in [attempt for attempt in begun(folder) if attempt not in judged and attempt < number]:
        verdict = _close(folder, job, look_back(folder, job, lost, lost=True))
        if verdict.action == "end":
            return verdict
    write_begin(folder, job, number, nodes)
    return None


def end(folder: JobFolder, number: int, cancelled: bool = False) -> Verdict:
    """Judge an attempt whose processes have ended."""
    job = folder.read()
    attempt = look_back(folder, job, number)
    if (cancelled or folder.cancelled.exists()) and attempt.outcome != "finished":
        attempt = replace(attempt, outcome="cancelled", status=STOPPED, line="cancelled")
    return _close(folder, job, attempt)


def _close(folder: JobFolder, job: Job, attempt: Attempt) -> Verdict:
    """Write an attempt into the history, with what follows from it."""
    verdict = judge([*read_history(folder), attempt], job.limits)
    append(folder, replace(attempt, decision=f"{verdict.action}: {verdict.why}"))
    say(f"attempt {attempt.number} {attempt.outcome}{told(attempt)}")
    if attempt.traceback:
        print(attempt.traceback, end="", file=sys.stderr)
    say(verdict.why)
    return verdict


def told(attempt: Attempt) -> str:
    """Who failed and why, as the end of a line."""
    where = f" on {attempt.node}" if attempt.node else ""
    who = f" by rank {attempt.rank}{where}" if attempt.rank is not None else where
    return who + (f": {attempt.line}" if attempt.line else "")


def say(line: str) -> None:
    """A line for the log of the batch script."""
    print(f"pretrain: {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the batch script of a Slurm job."""
    what, path = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the answer counts most when Slurm ends the job
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    folder, number = JobFolder(Path(path)), int(os.environ.get(ATTEMPT, "0"))
    job_id = os.environ["SLURM_JOB_ID"]
    if what == "begin":
        folder.note_start(job_id=job_id)  # the launcher may have ended before it could
        verdict = begin(folder, number, _nodes())
        if verdict is not None:
            say(verdict.why)
            print(verdict.status)
        return 0
    verdict = end(folder, number, _is_cancelled(job_id, number))
    print(_restart(folder, job_id, verdict) if verdict.action == "restart" else verdict.status, flush=True)
    return 0


def _is_cancelled(job_id: str, number: int) -> bool:
    """Whether somebody ends the job; no, where Slurm cannot be asked."""
    try:
        return scheduler.is_cancelled(scheduler.job_facts(job_id), number)
    except InputError as error:
        say(f"Slurm does not answer ({error})")
        return False


def _restart(folder: JobFolder, job_id: str, verdict: Verdict) -> int:
    """Hand the job back to Slurm; the status in case Slurm lets the script live."""
    try:
        scheduler.requeue(job_id)
    except InputError as error:
        say(f"cannot start again by itself ({error}); python launchers/jobs.py resume does")
        return STOPPED
    if verdict.exclude:
        _exclude(folder, job_id)
    return STOPPED


def _exclude(folder: JobFolder, job_id: str) -> None:
    known = folder.read().exclude
    nodes = [*([known] if known else []), *excluded(read_history(folder))]
    try:
        scheduler.exclude(job_id, nodes)
    except InputError as error:
        say(f"cannot leave out {', '.join(nodes)} ({error})")


def _nodes() -> list[str]:
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    return expand_hosts(nodes) if nodes else [socket.gethostname()]


if __name__ == "__main__":
    sys.exit(exit_status("pretrain", main))
