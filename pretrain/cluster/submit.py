"""Sending a job: its folder, the copy of the code, the resolved config, and submitit's executors."""

import io
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.core.utils import FailedJobError

from pretrain.cluster import scheduler
from pretrain.cluster.attempt import begin
from pretrain.cluster.job_folder import Job, JobFolder, Kind, Limits, new_job_folder
from pretrain.cluster.layout import cpus_per_task, job_name, tasks_per_node, with_absolute_paths, world_size
from pretrain.cluster.script import batch_script
from pretrain.cluster.snapshot import take_snapshot
from pretrain.config.load import holds_secrets, save_config
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.processes import started

LOCAL_MINUTES = 60 * 24 * 365  # submitit ends a local job after 2 minutes unless told otherwise
Work = Callable[[str], Callable[[], int]]  # folder of a job -> what each process does


@dataclass(frozen=True)
class Submitted:
    """A job that was sent, or has run."""

    folder: JobFolder
    job_id: str
    status: int = 0  # of a job that ran within this process


class _Executor(submitit.SlurmExecutor):
    """Submitit's executor with a batch script of ours."""

    def __init__(self, folder: JobFolder, cfg: Config, code: Path) -> None:
        super().__init__(folder=folder.path, python=interpreter(cfg))
        self.job_folder, self.cfg, self.code = folder, cfg, code
        self.update_parameters(nodes=cfg.cluster.nodes, ntasks_per_node=tasks_per_node(cfg.cluster))

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return batch_script(self.cfg, self.job_folder, self.code, shlex.quote(sys.executable), command)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        if holds_secrets(self.cfg):  # by the mode: Slurm would hand a umask on to the job
            submission_file_path.chmod(0o600)
        return super()._make_submission_command(submission_file_path)


def interpreter(cfg: Config) -> str:
    """The shell word, or words, that start Python in the processes of a job."""
    return cfg.cluster.python or shlex.quote(sys.executable)


def draft(cfg: Config) -> str:
    """The batch script as it would be submitted now; nothing is written."""
    cfg = with_absolute_paths(cfg)
    folder = JobFolder(Path(cfg.run.dir) / "jobs" / "TIME")
    task = f"{interpreter(cfg)} -u -m submitit.core._submit {shlex.quote(str(folder.path))}"
    code = Path(cfg.run.dir) / "code" / "HASH"
    return batch_script(cfg, folder, code, shlex.quote(sys.executable), task)


def prepare(cfg: Config, kind: Kind, code: Path | None = None) -> tuple[JobFolder, Config, Path]:
    """Make the folder of a job, with everything that it needs.

    Args:
        cfg: of the run.
        kind: of the job.
        code: the copy that it starts in; default: one of the present code.
    """
    cfg = with_absolute_paths(cfg)
    run_dir = Path(cfg.run.dir)
    code = code or take_snapshot(run_dir)
    folder = new_job_folder(run_dir)
    save_config(cfg, folder.config)
    cluster = cfg.cluster
    job = Job(
        kind=kind,
        run_dir=str(run_dir),
        code=str(code),
        world_size=world_size(cluster),
        nodes=cluster.nodes,
        steps=cfg.run.steps,
        global_batch_size=cfg.optim.global_batch_size,
        exclude=cluster.exclude,
        limits=Limits(cluster.max_restarts, cluster.max_crashes, cluster.max_bad_nodes),
    )
    folder.write(job)
    return folder, cfg, code


def submit(cfg: Config, work: Work, code: Path | None = None) -> Submitted:
    """Send a job to Slurm.

    Raises:
        InputError: Slurm refuses it; nothing of it is left.
    """
    folder, cfg, code = prepare(cfg, "slurm", code)
    try:
        with scheduler.outside_of_a_job(), redirect_stderr(io.StringIO()):  # the error says it as well
            job = _Executor(folder, cfg, code).submit(work(str(folder.path)))
    except BaseException as error:
        shutil.rmtree(folder.path)  # no job knows it
        if isinstance(error, FailedJobError):
            raise InputError(f"sbatch: {' '.join(str(error).split())}") from error
        raise
    folder.note_start(job_id=job.job_id)
    return Submitted(folder, job.job_id)


def submit_here(cfg: Config, work: Work, kind: Literal["local", "debug"]) -> Submitted:
    """Run a job once: in the background (submitit's local executor), or in this process (its debug one).

    Raises:
        InputError: it asks for more than one machine or, with debug, process.
    """
    _check_fits(cfg, kind)
    folder, cfg, code = prepare(cfg, kind)
    begin(folder, 0, [socket.gethostname()])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    with chdir(code):  # the processes look there first for what they import
        executor = submitit.AutoExecutor(folder=folder.path, cluster=kind)
        executor.update_parameters(**_local_parameters(cfg))
        job = executor.submit(work(str(folder.path)))
        if kind == "debug":
            return Submitted(folder, job.job_id, job.result())
    pid = str(job.job_id)
    folder.note_start(job_id=pid, started=started(pid), host=socket.gethostname())
    return Submitted(folder, pid)


def _local_parameters(cfg: Config) -> dict[str, Any]:
    cluster = cfg.cluster
    return {
        "name": job_name(cfg),
        "tasks_per_node": tasks_per_node(cluster),
        "gpus_per_node": cluster.gpus_per_node,
        "cpus_per_task": cpus_per_task(cfg),
        "timeout_min": LOCAL_MINUTES,
    }


def _check_fits(cfg: Config, kind: str) -> None:
    if cfg.cluster.nodes > 1:
        raise InputError(f"cluster.nodes: --cluster {kind} has one machine, not {cfg.cluster.nodes}")
    if kind == "debug" and world_size(cfg.cluster) > 1:
        raise InputError("cluster.tasks_per_node: --cluster debug runs one process; add --tasks-per-node 1")
