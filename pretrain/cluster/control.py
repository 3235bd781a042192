"""Stopping jobs and letting them go on."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from pretrain.cluster import scheduler
from pretrain.cluster.checks import is_alive
from pretrain.cluster.history import begun
from pretrain.cluster.job_folder import Job, JobFolder, job_folders, newest_job
from pretrain.errors import InputError
from pretrain.processes import children
from pretrain.records import read_records


def cancel(run_dir: Path, now: bool = False) -> str:
    """End the jobs of a run for good, after a save: the one that runs, and those that wait behind it.

    Args:
        run_dir: of the run.
        now: without a save.

    Returns:
        What was done, for people.

    Raises:
        InputError: there is no job, or none that waits or runs.
    """
    newest = newest_job(run_dir).read()
    alive = [(folder, job) for folder in job_folders(run_dir) if is_alive(job := folder.read())]
    if not alive:
        raise InputError(f"{run_dir}: its job {newest.job_id} is over; nothing to cancel")
    lines = []
    for folder, job in reversed(alive):  # those that wait first: none of them is to start meanwhile
        folder.cancelled.touch()
        end = _cancel_slurm if job.kind == "slurm" else _cancel_here
        lines.append(end(folder, job, now))
    return "\n".join(lines)


def _cancel_slurm(folder: JobFolder, job: Job, now: bool) -> str:
    waits = scheduler.job_facts(job.job_id).get("JobState") in scheduler.PENDING
    if now or waits or not _started(folder):
        scheduler.call("scancel", job.job_id)
        return f"job {job.job_id}: cancelled"
    scheduler.call("scancel", "--signal=USR2", job.job_id)
    return f"job {job.job_id}: its processes save and end; `status` tells when"


def _cancel_here(folder: JobFolder, job: Job, now: bool) -> str:
    pid = int(job.job_id)
    if now:
        for process in (*_processes(folder), *children(pid), pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return f"process {pid}: killed"
    for process in _processes(folder) or [pid]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGUSR2)
    return f"process {pid}: its processes save and end; `status` tells when"


def _started(folder: JobFolder) -> bool:
    """Whether a process of the last attempt runs, which a signal would reach."""
    return bool(_processes(folder))


def _processes(folder: JobFolder) -> list[int]:
    """The processes of the last attempt that have not said that they end."""
    attempts = begun(folder)
    records = read_records(folder.attempt(attempts[-1])).values() if attempts else ()
    return [record.pid for record in records if record.status is None]
