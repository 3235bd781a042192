"""What is looked at before anything is submitted or written."""

import os
import socket
import tempfile
from pathlib import Path

from pretrain.cluster import scheduler
from pretrain.cluster.job_folder import Job, job_folders
from pretrain.cluster.layout import world_size
from pretrain.config.derived import micro_batch_size, shard_settings
from pretrain.config.schema import Config
from pretrain.data.shards import check_logged_shards, shard_names
from pretrain.errors import InputError
from pretrain.processes import started
from pretrain.ranks import check_engine_kind
from pretrain.run.checkpoint_folder import newest_step, require_complete

OWN_LIMIT = ("--partition", "-p", "--time", "-t")  # options that say more than section cluster


def check_run(cfg: Config) -> int:
    """Refuse what could not train on this many devices.

    Returns:
        Optimizer steps that the run has done already.

    Raises:
        InputError: one line that names the setting and the fix.
    """
    check_engine_kind(cfg.engine.kind, world_size(cfg.cluster))
    micro_batch_size(cfg, world_size(cfg.cluster))
    _check_shards(cfg)
    _check_name(cfg)
    run_dir = Path(cfg.run.dir)
    done = newest_step(run_dir / "checkpoints")
    if done >= cfg.run.steps:
        raise InputError(f"run.dir: {run_dir} is finished at step {done}; set run.steps higher to train on")
    _check_start(cfg, done)
    _check_writable(run_dir)
    if not cfg.cluster.dependency:
        _check_idle(run_dir)
    return done


def check_with_slurm(cfg: Config, script: str) -> str:
    """Let Slurm judge the script.

    Returns:
        When it would start, in Slurm's words.

    Raises:
        InputError: Slurm would refuse it, or let it wait for ever.
    """
    scheduler.require_slurm()
    answer = scheduler.test_only(script)
    if any(option.startswith(OWN_LIMIT) for option in cfg.cluster.sbatch_args):
        return answer
    partition = cfg.cluster.partition or os.environ.get("SBATCH_PARTITION", "")
    name, limit = scheduler.partition_limit(partition)
    asked = scheduler.minutes(cfg.cluster.time) if cfg.cluster.time else 0.0
    if asked > limit:  # sbatch takes such a job, and never starts it
        raise InputError(
            f"cluster.time: {cfg.cluster.time} is longer than partition {name} allows, {limit:g} minutes"
        )
    signal = cfg.cluster.signal_seconds
    if 0 < (asked or limit) * 60 <= signal:
        raise InputError(
            f"cluster.signal_seconds: {signal} s before the time limit of {asked or limit:g} minutes is "
            "before the start; lower it"
        )
    return answer


def _check_shards(cfg: Config) -> None:
    """All shards that the run reads are there."""
    check_logged_shards(cfg.log)
    for key, patterns in shard_settings(cfg.data).items():
        shard_names(patterns, key)


def _check_name(cfg: Config) -> None:
    """The run's folder can stand in a script, and as the source of a mount."""
    name = cfg.run.dir
    if name.startswith("~") or not name.isprintable():
        raise InputError(f"run.dir: {name!r} must be a plain path; write out the home folder")
    path = str(Path(name).absolute())
    if ":" in path or "\\" in path:  # of a list of folders; before a pattern of Slurm
        raise InputError(f"run.dir: {path!r} must hold no colon or backslash, for PYTHONPATH and sbatch")
    if cfg.cluster.container_image and "," in path:
        raise InputError(f"run.dir: {name!r} is mounted in a container: it must hold no comma")


def _check_start(cfg: Config, done: int) -> None:
    """What the run starts from is there; a job that waits for another one may find it later."""
    if done or cfg.cluster.dependency:
        return
    if cfg.checkpoint.resume_from:
        require_complete(Path(cfg.checkpoint.resume_from))
    elif cfg.model.init_from and not Path(cfg.model.init_from).exists():
        raise InputError(f"model.init_from: {cfg.model.init_from}: no such file or folder")


def _check_writable(run_dir: Path) -> None:
    """A file can be made where the run's folder is, or would be."""
    place = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"run.dir: {run_dir}: cannot write in {place} ({error.strerror})") from error


def _check_idle(run_dir: Path) -> None:
    """No other job is at work on the run: the second one would wait for the first one's lock, in vain."""
    for folder in job_folders(run_dir):
        job = folder.read()
        if is_alive(job):
            raise InputError(
                f"run.dir: job {job.job_id} is at work on {run_dir}; cancel it (launchers/jobs.py cancel), "
                f"or let this one follow with --dependency afterany:{job.job_id}"
            )


def is_alive(job: Job) -> bool:
    """Whether a job waits or runs; of a process on another machine this cannot be told, so it does not."""
    if not job.job_id:
        return False
    if job.kind == "slurm":
        return scheduler.here() and scheduler.is_active(scheduler.job_facts(job.job_id))
    return job.host == socket.gethostname() and bool(job.started) and started(job.job_id) == job.started
