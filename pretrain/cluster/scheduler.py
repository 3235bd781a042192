"""The questions and orders for Slurm: sbatch, scontrol, squeue and scancel. None for its accounting."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pretrain.errors import InputError

SECONDS = 60  # that a busy controller may take
ATTEMPTS = 3  # at an order that must not be lost
FIELD = re.compile(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)")
GONE = re.compile("Invalid job id", re.IGNORECASE)
WAITS = re.compile("Job is pending execution", re.IGNORECASE)
OF_A_JOB = ("SLURM_", "SLURMD_", "PMI", "SUBMITIT_", "PRETRAIN_")  # SBATCH_ are a person's own
PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")
ACTIVE = (*PENDING, "RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")


def require_slurm() -> None:
    """Refuse to go on where there is no Slurm.

    Raises:
        InputError: a command is missing.
    """
    missing = [name for name in ("sbatch", "srun", "scontrol", "scancel") if shutil.which(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not found; run this on a machine of a Slurm cluster, or use "
            "launchers/local.py, or --cluster local"
        )


def call(*command: str, text: str | None = None) -> str:
    """What a command of Slurm prints.

    Raises:
        InputError: it fails; the line holds its own words.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise InputError(f"{command[0]}: {_words(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout + (done.stderr if "--test-only" in command else "")


def job_facts(job_id: str) -> dict[str, str]:
    """What `scontrol show job` says, such as JobState; empty for a job that Slurm has forgotten."""
    try:
        return parse(call("scontrol", "show", "job", "-o", job_id))
    except InputError as error:
        if GONE.search(str(error)):
            return {}
        raise


def parse(text: str) -> dict[str, str]:
    """The fields `Name=value` of the first line."""
    return dict(FIELD.findall(text.partition("\n")[0].strip()))


def restarts_by_itself(facts: dict[str, str], attempt: int) -> bool:
    """Whether Slurm has requeued a job already, asked from within an attempt: a machine of it has failed."""
    return int(facts.get("Restarts", "0")) > attempt


def is_cancelled(facts: dict[str, str], attempt: int) -> bool:
    """Whether a person or a deadline ends a job, asked from within it: its processes are signalled first.

    Slurm 22.05 calls it COMPLETING then, as after the time limit, where it names that as the reason, and as
    after the failure of a machine, where it counts the restart that follows.
    """
    state, reason = facts.get("JobState", ""), facts.get("Reason", "None")
    ends = state == "COMPLETING" and reason == "None" and not restarts_by_itself(facts, attempt)
    return ends or state in ("CANCELLED", "DEADLINE")


def is_active(facts: dict[str, str]) -> bool:
    """Whether a job waits or runs."""
    return facts.get("JobState", "") in ACTIVE


def requeue(job_id: str) -> None:
    """Let a running job start again; a busy controller is asked several times.

    Raises:
        InputError: it cannot be.
    """
    for attempt in range(ATTEMPTS):
        try:
            call("scontrol", "requeue", job_id)
        except InputError as error:
            if WAITS.search(str(error)):  # Slurm was faster
                return
            if attempt == ATTEMPTS - 1 or not here():
                raise
            time.sleep(1 + attempt)
        else:
            return


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Leave machines out of a job; it must wait, after a requeue: Slurm refuses it of a running one."""
    call("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")


def test_only(script: str) -> str:
    """When sbatch would start a script, in its words.

    Raises:
        InputError: it would refuse.
    """
    with outside_of_a_job():
        return _words(call("sbatch", "--test-only", text=script))


def partition_limit(partition: str) -> tuple[str, float]:
    """Name and longest time, in minutes, of a partition; "" stands for the cluster's default.

    Of several, separated by commas, the one with the longest time counts: the job may start there.
    """
    wanted = [name for name in partition.split(",") if name]
    lines = [parse(line) for line in call("scontrol", "-o", "show", "partition").splitlines()]
    chosen = [
        line
        for line in lines
        if line.get("PartitionName") in wanted or (not wanted and line["Default"] == "YES")
    ]
    limits = [(minutes(line.get("MaxTime", "UNLIMITED")), line["PartitionName"]) for line in chosen]
    longest, name = max(limits, default=(float("inf"), partition))
    return name, longest


def minutes(text: str) -> float:
    """A time as Slurm writes it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    if text in ("UNLIMITED", "INFINITE", "NONE", "Partition_Limit"):
        return float("inf")
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, mins, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, (mins, seconds) = 0, (*parts, 0)[:2]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Hide what Slurm tells the job that this process runs in, if any: a job may submit another one."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    hidden = {name: os.environ[name] for name in list(os.environ) if name.startswith(OF_A_JOB)}
    try:
        for name in hidden:
            if name not in kept:
                del os.environ[name]
        yield
    finally:
        os.environ.update(hidden)


def here() -> bool:
    """Whether this machine can talk to Slurm."""
    return shutil.which("scontrol") is not None


def _words(text: str) -> str:
    """The lines of a command without its name before each."""
    lines = [
        re.sub(r"^(sbatch|scontrol|scancel|squeue|srun): (error: )?", "", line) for line in text.splitlines()
    ]
    return "; ".join(line.strip() for line in lines if line.strip())
