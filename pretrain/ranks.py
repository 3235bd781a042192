"""Which of the processes that train together this one is: told by torchrun, by variables, or by Slurm.

The first of these that speaks counts; without any, one process trains alone. No torch.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pretrain.errors import InputError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, PORTS = 10_000, 22_768  # below the ports that the kernel hands out, which begin at 32768
STEPS_PER_JOB = 7  # of Slurm, whose ports differ; the jobs of a machine mostly have neighbouring numbers
RESTART_STRIDE = 3_571  # a job that is started again takes another port: the old one may have been taken


@dataclass(frozen=True)
class Ranks:
    """This process among all, and where rank 0 is met."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this machine
    local_world_size: int  # processes of this machine; where nobody tells, local_rank + 1
    master_addr: str  # machine of rank 0
    master_port: int  # there
    source: Literal["torchelastic", "explicit", "slurm", "single"]


SINGLE = Ranks(0, 1, 0, 1, "127.0.0.1", 0, "single")


def detect(environ: Mapping[str, str]) -> Ranks:
    """Read the environment: torchrun's or explicit variables first, then Slurm's, else a single process.

    Args:
        environ: `os.environ`, or a part of it.

    Raises:
        InputError: variables are missing, are no numbers or contradict one another; the line names them.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _explicit(environ)
    if _in_slurm_step(environ):
        return _slurm(environ)
    return SINGLE


def check_engine_kind(kind: str, world_size: int) -> None:
    """Refuse an engine that cannot train in so many processes; asked before a job is sent, and in it.

    Args:
        kind: `engine.kind`.
        world_size: processes that train together.

    Raises:
        InputError: one line with the engine to use.
    """
    if kind == "single" and world_size > 1:
        raise InputError(
            f"engine.kind=single trains in one process, not in {world_size}; use engine.kind=ddp, or "
            "start one"
        )
    if kind in ("ddp", "fsdp2") and world_size == 1:
        raise InputError(
            f"engine.kind={kind} trains in several processes, not in one; use engine.kind=single, or start "
            "more (launchers/local.py, torchrun, srun)"
        )


def _explicit(environ: Mapping[str, str]) -> Ranks:
    alone = environ.get("WORLD_SIZE") == "1" and environ.get("RANK") == "0"
    missing = [name for name in NEEDED if not environ.get(name)]
    if missing and not alone:
        given = ", ".join(name for name in NEEDED if name in environ)
        raise InputError(
            f"{', '.join(missing)}: not set, but {given} is; set all of {', '.join(NEEDED)}, "
            "or none and start with torchrun or srun"
        )
    elastic = "TORCHELASTIC_RUN_ID" in environ
    local_rank = _number(environ, "LOCAL_RANK", "0")
    ranks = Ranks(
        rank=_number(environ, "RANK"),
        world_size=_number(environ, "WORLD_SIZE"),
        local_rank=local_rank,
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", str(local_rank + 1)),
        master_addr=environ.get("MASTER_ADDR", SINGLE.master_addr),
        master_port=_number(environ, "MASTER_PORT", "0"),
        source="torchelastic" if elastic else "explicit",
    )
    if not elastic and _in_slurm_step(environ):  # torchrun in a Slurm task starts processes of its own
        _refuse_other_size(environ, ranks.world_size)
    return _checked(ranks, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process beside others.

    A batch script and the shell of salloc have a SLURM_PROCID too, but belong to no numbered step.
    """
    started = "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ)
    return started and _number(environ, _tasks_variable(environ), "1") > 1


def _tasks_variable(environ: Mapping[str, str]) -> str:
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    return next((name for name in names if name in environ), "SLURM_NTASKS")


def _slurm(environ: Mapping[str, str]) -> Ranks:
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if not hosts and not environ.get("MASTER_ADDR"):
        raise InputError("SLURM_STEP_NODELIST: not set in a Slurm step; set MASTER_ADDR to rank 0's machine")
    tasks, local_rank = _tasks_variable(environ), _number(environ, "SLURM_LOCALID", "0")
    ranks = Ranks(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, tasks),
        local_rank=local_rank,
        local_world_size=_slurm_local_size(environ, local_rank),
        master_addr=environ.get("MASTER_ADDR") or expand_hosts(hosts)[0],
        master_port=_number(environ, "MASTER_PORT", str(_slurm_port(environ))),
        source="slurm",
    )
    return _checked(ranks, ("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"))


def _slurm_local_size(environ: Mapping[str, str], local_rank: int) -> int:
    """Tasks of this machine, from a list such as `4(x2),3`, one number a machine."""
    tasks: list[int] = []
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_NTASKS_PER_NODE", "")
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        tasks += [int(count)] * int(times or 1)
    node = _number(environ, "SLURM_NODEID", "0")
    if len(tasks) == 1:  # SLURM_NTASKS_PER_NODE, or a single machine
        return tasks[0]
    return tasks[node] if node < len(tasks) else local_rank + 1


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port that other jobs and steps on the machine do not compute."""
    job = _number(environ, "SLURM_JOB_ID", "0")
    step = _number(environ, "SLURM_STEP_ID" if "SLURM_STEP_ID" in environ else "SLURM_STEPID", "0")
    restarts = _number(environ, "SLURM_RESTART_COUNT", "0")
    return FIRST_PORT + (job * STEPS_PER_JOB + step + restarts * RESTART_STRIDE) % PORTS


def expand_hosts(text: str) -> list[str]:
    """The machines of a Slurm list: `gpu[03-05,7],login1` is gpu03, gpu04, gpu05, gpu7, login1.

    Raises:
        InputError: the list is not well-formed.
    """
    # a comma within brackets belongs to its entry
    entries = [entry for entry in re.split(r",(?![^\[]*\])", text.strip()) if entry]
    hosts = [host for entry in entries for host in _expand_entry(entry)]
    if not hosts or any(re.search(r"[\[\]\s]", host) for host in hosts):
        raise InputError(f"SLURM_STEP_NODELIST={text!r} is not a list of machines; set MASTER_ADDR")
    return hosts


def _expand_entry(entry: str) -> list[str]:
    """One entry; each of its brackets holds numbers and ranges, whose leading zeros are kept."""
    parts = re.split(r"\[([-\d,]+)\]", entry)  # texts at even places, contents of brackets at odd ones
    choices = [_expand_range(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _expand_range(text: str) -> list[str]:
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            return [f"[{text}]"]  # left as it is, which `expand_hosts` refuses
        first, last = match[1], match[2] or match[1]
        numbers += [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return numbers


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    value = environ.get(name) or default
    if not value.isascii() or not value.isdigit():
        raise InputError(f"{name}={value} is not a whole number; set it right, or unset it")
    return int(value)


def _checked(ranks: Ranks, names: tuple[str, str, str, str]) -> Ranks:
    """The ranks, if their numbers fit one another; `names` are those of the variables they come from."""
    rank, size, local_rank, local_size = names
    if ranks.rank >= ranks.world_size:
        raise InputError(f"{rank}={ranks.rank} is not below {size}={ranks.world_size}; ranks count from 0")
    if ranks.local_rank >= ranks.local_world_size:
        given = f"{local_rank}={ranks.local_rank} is not below {local_size}={ranks.local_world_size}"
        raise InputError(f"{given}; both count the processes of one machine")
    if ranks.world_size > 1 and not 0 < ranks.master_port < 65_536:
        raise InputError(f"MASTER_PORT={ranks.master_port} is not a port; use one from 1024 to 65535")
    return ranks


def _refuse_other_size(environ: Mapping[str, str], world_size: int) -> None:
    name = _tasks_variable(environ)
    tasks = _number(environ, name)
    if tasks != world_size and world_size > 1:
        raise InputError(
            f"WORLD_SIZE={world_size}, but Slurm started {name}={tasks} tasks; unset RANK and WORLD_SIZE "
            "to use Slurm's numbers, or start as many tasks"
        )
