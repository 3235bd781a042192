"""What the ranks of tests/test_session.py do: `python -m tests.rank_work NAME FOLDER`."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pretrain.command_line import exit_status
from pretrain.config.load import load_config
from pretrain.config.schema import EngineConfig
from pretrain.distributed import all_max, all_sum, any_rank, barrier, is_main, largest, rank, say, world_size
from pretrain.errors import InputError, TrainingError
from pretrain.faults import PeerError
from pretrain.run.metrics import Averages
from pretrain.run.preemption import Preemption
from pretrain.run.watchdog import Watchdog
from pretrain.session import session
from pretrain.train import main

CFG = EngineConfig(device="cpu", timeout=60.0, hang_timeout=30.0)
SHORT = EngineConfig(device="cpu", timeout=4.0, hang_timeout=1.0)


def agreements(folder: Path) -> int:
    """What ranks agree on and reduce, as JSON."""
    with session(CFG) as device:
        mine = rank()
        found = {
            "ranks": [mine, world_size(), is_main(), device.type],
            "sum": all_sum(torch.tensor([1.0, float(mine)])).tolist(),
            "max": all_max(torch.tensor([float(mine), -float(mine)])).tolist(),
            "any": [any_rank(mine == 1), any_rank(False)],
            "largest": largest(10 + mine),
            "means": _means(mine),
            "stops": _stops(mine, check_every=1) + _stops(mine, check_every=4),
        }
        barrier()
        say("said once")
    # One write: the line's end must not be a second one, between which another rank's line can fall.
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _means(mine: int) -> dict[str, float]:
    """Rank 0 adds 1 and 2 to `loss`, rank 1 adds 6 and a value that does not count."""
    averages = Averages()
    for value, good in ((1.0, True), (2.0, True)) if mine == 0 else ((6.0, True), (torch.nan, False)):
        averages.add({"loss": torch.tensor(value)}, torch.tensor(good))
    averages.add({"norm": torch.tensor(float(mine))})
    averages.add({"never": torch.tensor(1.0)}, False)
    return {name: str(value) for name, value in averages.means().items()}


def _stops(mine: int, check_every: int) -> list[object]:
    """Rank 1 is signalled in step 3; where each rank stops, and why."""
    with Preemption(check_every) as preemption:
        for step in range(1, 20):
            if step == 3 and mine == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if preemption.agreed(step):
                return [step, preemption.reason]
    return []


def input_error(folder: Path) -> int:
    """Rank 1 finds something wrong while rank 0 waits for it."""
    with session(CFG):
        if rank() == 1:
            raise InputError("data.shards: /d/7.tar: no such file; check the path")
        all_sum(torch.ones(1))
    return 0


def same_error(folder: Path) -> int:
    """All ranks find the same."""
    with session(CFG):
        raise InputError("data.shards: names no shard")


def training_error(folder: Path) -> int:
    """Rank 0 cannot go on, in the middle of what rank 1 waits for."""
    with session(CFG):
        for step in range(9):
            if rank() == 0 and step == 3:
                raise TrainingError("10 steps in a row were skipped")
            any_rank(False)
    return 0


def traceback(folder: Path) -> int:
    """Rank 1 has a bug."""
    with session(CFG):
        if rank() == 1:
            raise ZeroDivisionError("unforeseen")
        barrier()
    return 0


def agreed_error(folder: Path) -> int:
    """As in `train.read_steps`: all save, then the rank that has the error raises it."""
    with session(CFG):
        if any_rank(rank() == 1):
            (folder / f"saved_{rank()}").touch()
            barrier()
            raise TrainingError("/d/7.tar: cannot be read") if rank() == 1 else PeerError("another one")
    return 0


def killed(folder: Path, victim: int = 1) -> int:
    """A rank is killed, as for memory."""
    with session(CFG):
        any_rank(False)
        if rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        any_rank(False)
    return 0


def first_killed(folder: Path) -> int:
    """The rank that holds the store is killed."""
    return killed(folder, victim=0)


def training(folder: Path) -> int:
    """A real run; each rank has a config of its own, as their data differ."""
    return main(load_config(folder / f"{os.environ['RANK']}.yaml"))


def hang(folder: Path) -> int:
    """Rank 1 stops in the middle of the third step."""
    with session(SHORT), Watchdog(folder / "stacks", SHORT) as watchdog:
        for step in range(5):
            if step == 2 and rank() == 1:
                stuck_here()
            all_sum(torch.ones(1))
            watchdog.step()
    return 0


def stuck_here() -> None:
    time.sleep(1000)


WORK: tuple[Callable[[Path], int], ...] = (
    *(agreements, input_error, same_error, training_error, traceback, agreed_error, killed, first_killed),
    training,
    hang,
)

if __name__ == "__main__":
    work = next(work for work in WORK if work.__name__ == sys.argv[1])
    name = f"pretrain: rank {os.environ['RANK']}" if os.environ["RANK"] != "0" else "pretrain"
    sys.exit(exit_status(name, lambda: work(Path(sys.argv[2]))))
