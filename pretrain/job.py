"""What runs inside each process of a job: find the own place, check the machine, train, write down the end.

`launchers/slurm.py` hands a `Task` to submitit; `python -m pretrain.job JOB_FOLDER` is the same for torchrun.
A process that has saved and can be continued ends with status 0, so that nobody kills the ones that are still
at it; its record says what it was.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pretrain import records
from pretrain.cluster.job_folder import JobFolder
from pretrain.cluster.script import ATTEMPT
from pretrain.command_line import STOPPED, exit_status
from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.errors import LostPeerError
from pretrain.processes import let_threads_sleep
from pretrain.ranks import FIRST_PORT, PORTS, STEPS_PER_JOB, Ranks, detect
from pretrain.redaction import show_unexpected

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class Task:
    """One process of a job, as submitit stores it: only a place, where the state of the run lies."""

    folder: str
    own_log: bool = True  # whether its output goes to a file of its own

    def __call__(self) -> int:
        """Run it; the exit status, where the process may end with 0.

        Raises:
            SystemExit: with another status.
        """
        return run(JobFolder(Path(self.folder)), self.own_log)


def run(folder: JobFolder, own_log: bool = True) -> int:
    """Train as one of the processes of a job; 0 when finished, `STOPPED` when it is to be continued."""
    _end_on_signals()
    attempt = int(os.environ.get(ATTEMPT, "0"))
    _take_submitit_ranks()
    ranks = detect(os.environ)
    if own_log:
        _write_to(folder.rank_log(attempt, ranks.rank))
    records.begin(folder.attempt(attempt), ranks.rank)
    let_threads_sleep()
    name = f"pretrain: rank {ranks.rank}" if ranks.rank else "pretrain"
    try:
        status = exit_status(name, lambda: _recorded(lambda: _train(load_config(folder.config), ranks)))
    except SystemExit as stop:
        status = int(stop.code or 0)
    except Exception as error:
        if not own_log:  # one process within the launcher, for a debugger
            raise
        show_unexpected(type(error), error, error.__traceback__)  # submitit would keep its secrets
        status = 1
    if status not in (0, STOPPED):
        _leave(status)
    return status


def _train(cfg: Config, ranks: Ranks) -> int:
    """The check of the machines, then the training."""
    from pretrain import preflight, train  # torch takes seconds to import

    kept = preflight.check_nodes(cfg, ranks) if cfg.cluster.preflight_timeout else []
    status = train.main(cfg)
    kept.clear()  # not before: others may still read there
    return status


def _recorded(command: Callable[[], int]) -> int:
    """Run a command and write down its end."""
    try:
        status = command()
    except BaseException as error:
        follows = isinstance(error, LostPeerError | SystemExit)  # of what another rank has met
        records.end_with(error, is_cause=not follows, bad_nodes=getattr(error, "nodes", []))
        raise
    records.end(status)
    return status


def _leave(status: int) -> None:
    """End with a status, also where a thread hangs that the machines' check has left behind."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_on_signals() -> None:
    """Until training looks at signals itself there is nothing to save, so a signal ends the process at once.

    A thread does it: the main one may wait for other ranks, in a call that no signal interrupts.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS:
        signal.signal(number, _noticed)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets the number of each signal
    threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True).start()


def _noticed(number: int, frame: FrameType | None) -> None:
    """The thread acts; after the training, a process that is about to end is left to do so."""


def _listen(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in SIGNALS and not records.has_trained():
                records.end_unsaved()
                _leave(0)


def _write_to(log: Path) -> None:
    """Let all that this process prints, from libraries too, go to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)  # less the umask
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _take_submitit_ranks() -> None:
    """Translate what submitit's local executor tells its processes; it starts them on one machine."""
    given = os.environ
    if given.get("SUBMITIT_EXECUTOR") != "local" or int(given.get("SUBMITIT_LOCAL_NTASKS", "1")) == 1:
        return
    job = int(given["SUBMITIT_LOCAL_JOB_ID"])
    given["RANK"], given["WORLD_SIZE"] = given["SUBMITIT_LOCAL_GLOBALID"], given["SUBMITIT_LOCAL_NTASKS"]
    given["LOCAL_RANK"], given["LOCAL_WORLD_SIZE"] = given["SUBMITIT_LOCAL_LOCALID"], given["WORLD_SIZE"]
    given["MASTER_ADDR"] = "127.0.0.1"
    given["MASTER_PORT"] = str(FIRST_PORT + job * STEPS_PER_JOB % PORTS)


if __name__ == "__main__":
    finished = run(JobFolder(Path(sys.argv[1])))
    sys.exit(0 if finished in (0, STOPPED) else finished)
