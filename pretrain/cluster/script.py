"""The batch script of a job: options for sbatch, then check, start, and decide how it goes on."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from pretrain.cluster.job_folder import JobFolder
from pretrain.cluster.layout import cpus_per_task, job_name, tasks_per_node
from pretrain.config.schema import ClusterConfig, Config

ATTEMPT = "PRETRAIN_ATTEMPT"  # number of an attempt, 0 the first; set for all processes
BODY = """\
{setup}
export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}
export SUBMITIT_EXECUTOR=slurm {variable}=${{SLURM_RESTART_COUNT:-0}}
attempt() {{ {python} -m pretrain.cluster.attempt "$@"; }}

# The ranks save when Slurm signals them; this shell is signalled too, and has to see how they end.
trap : TERM USR2

# A run that is finished or cancelled, or has used up its restarts, ends here.
status=$(attempt begin {folder}) || status=1
[ -z "$status" ] || exit "$status"

{srun} \\
    {task}

# Starts the job again where that has sense; prints the exit status that the script is to end with.
status=$(attempt end {folder})
exit "${{status:-1}}"
"""


def batch_script(cfg: Config, folder: JobFolder, code: Path, python: str, task: str) -> str:
    """The complete script.

    Args:
        cfg: of the run.
        folder: of the job.
        code: the copy of the code that it starts in.
        python: interpreter that decides about restarts, outside of a container.
        task: shell command that each process runs.
    """
    options = "".join(f"#SBATCH {option}\n" for option in _options(cfg, folder, code))
    body = BODY.format(
        setup="\n".join(cfg.cluster.setup),
        code=shlex.quote(str(code)),
        folder=shlex.quote(str(folder.path)),
        variable=ATTEMPT,
        python=shlex.quote(python),
        srun=" \\\n    ".join(_srun(cfg, folder, code)),
        task=task,
    )
    return f"#!/bin/bash\n# Made by launchers/slurm.py; docs/slurm.md explains its parts.\n{options}\n{body}"


def _options(cfg: Config, folder: JobFolder, code: Path) -> Iterator[str]:
    """The options of sbatch, quoted as it reads them."""
    cluster = cfg.cluster
    yield _option("job-name", job_name(cfg))
    yield f"--nodes={cluster.nodes}"
    yield f"--ntasks-per-node={tasks_per_node(cluster)}"
    yield f"--cpus-per-task={cpus_per_task(cfg)}"
    if cluster.gpus_per_node:
        yield f"--gpus-per-node={cluster.gpus_per_node}"
    if cluster.mem_gb is not None:
        yield f"--mem={cluster.mem_gb}G"
    wishes = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "dependency": cluster.dependency,
    }
    yield from (_option(name, value) for name, value in wishes.items() if value)
    if cluster.dependency:
        yield "--kill-on-invalid-dep=yes"
    if cluster.mail:
        yield _option("mail-user", cluster.mail)
        yield "--mail-type=BEGIN,END,FAIL,REQUEUE"
    yield f"--signal=USR2@{cluster.signal_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield _option("output", str(folder.batch_log).replace("%", "%%"))
    yield _option("chdir", str(code))
    yield from cluster.sbatch_args


def _srun(cfg: Config, folder: JobFolder, code: Path) -> Iterator[str]:
    """One process a device; the first one that fails ends all, and nothing waits for ever."""
    yield "srun --kill-on-bad-exit=1 --wait=60 --distribution=block"
    yield f"--cpus-per-task={cpus_per_task(cfg)}"  # Slurm 22.05 does not hand it on
    yield from _container(cfg.cluster, [Path(cfg.run.dir), folder.path, code])
    if cfg.cluster.srun_args:
        yield shlex.join(cfg.cluster.srun_args)


def _container(cluster: ClusterConfig, folders: list[Path]) -> Iterator[str]:
    if cluster.container_image:
        own = folders[0]  # the others lie in it
        mounts = [f"{own.resolve()}:{own}", *cluster.container_mounts]
        yield _option("container-image", cluster.container_image)
        yield _option("container-mounts", ",".join(mounts))
        yield _option("container-workdir", str(folders[-1]))


def _option(name: str, value: str) -> str:
    return f"--{name}={shlex.quote(value)}"
