"""Two ranks train and save each step until one is killed; every new start must find a whole checkpoint.

A script: FOLDER KILLS SEED. Starts take turns in how tensors are held (plain or sharded) and in how they are
saved (at once or behind training). Before each save the digest of the state is written beside the
checkpoints; the next start compares what it loads. The script ends when KILLS kills fell into a save (or five
times as many in all), and prints how many did.
"""

import hashlib
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pretrain.run.checkpoint import Checkpoints, load_checkpoint
from tests.run.forked import run_ranks, start_ranks, wait_for

SURVIVOR_SECONDS = 30  # after which a rank whose partner is dead counts as hanging
State = dict[str, dict[str, Tensor]]


class Training:
    """A small model and AdamW on two ranks."""

    def __init__(self, sharded: bool) -> None:
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for layer in self.layers:
                fully_shard(layer, mesh=mesh)
            self.model: nn.Module = fully_shard(self.layers, mesh=mesh)
        else:
            self.model = DistributedDataParallel(self.layers)
        self.optimizer = torch.optim.AdamW(self.layers.parameters(), lr=1e-2)
        for parameter in self.layers.parameters():
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}

    def train(self, step: int) -> None:
        draw = torch.Generator().manual_seed(2 * step + dist.get_rank())
        loss = self.model(torch.randn(4, 300, generator=draw)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> State:
        moments = {
            f"{name}.{moment}": value
            for name, parameter in self.layers.named_parameters()
            for moment, value in self.optimizer.state[parameter].items()
        }
        return {"model": self.layers.state_dict(), "optim": moments}


def digest(state: State) -> str:
    sha = hashlib.sha256()
    for part, named in state.items():
        for name, tensor in sorted(named.items()):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            sha.update(f"{part} {name}".encode() + whole.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def resume(training: Training, checkpoints: Checkpoints, digests: Path) -> int:
    """Load the newest checkpoint, which must hold what was to be saved for its step; the steps done."""
    newest = checkpoints.newest()
    assert not [*checkpoints.folder.glob("*.tmp"), *checkpoints.folder.glob("*.old")], "not cleaned up"
    if newest is None:
        return 0
    state = training.state()
    data, run = load_checkpoint(newest, state)
    assert newest.name == f"step_{run['step']:08d}" and data == {"position": 8 * run["step"]}
    assert digest(state) == (digests / str(run["step"])).read_text(), "not what was saved for the step"
    return int(run["step"])


def train_until_killed(folder: Path, sharded: bool, asynchronous: bool, steps: int = 1_000_000) -> None:
    digests, training = folder / "digests", Training(sharded)
    with Checkpoints(folder / "checkpoints", 2, 0, asynchronous) as checkpoints:
        done = resume(training, checkpoints, digests)
        for step in range(done + 1, done + steps + 1):
            training.train(step)
            state = training.state()
            sha = digest(state)
            if dist.get_rank() == 0:
                (digests / str(step)).write_text(sha)
            checkpoints.save(step, state, {"position": 8 * step}, {"step": step})


def newest_step(folder: Path) -> int:
    steps = [int(path.parent.name[5:]) for path in folder.glob("checkpoints/step_????????/COMPLETE")]
    return max(steps, default=0)


def kill_one(folder: Path, pids: list[int], draw: random.Random) -> bool:
    """Kill a rank at a random moment after the first new checkpoint; whether that was within a save."""
    since, before = time.monotonic(), newest_step(folder)
    while newest_step(folder) <= before:
        assert time.monotonic() < since + 60, "no checkpoint in a minute"
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.3))
    acknowledged = newest_step(folder)
    os.kill(draw.choice(pids), signal.SIGKILL)
    ends = wait_for(pids, SURVIVOR_SECONDS)
    assert sorted(ends.values()) == [-signal.SIGKILL, 1], f"the other rank did not end by itself: {ends}"
    assert newest_step(folder) >= acknowledged, "a complete checkpoint is lost"
    return any((folder / "checkpoints").glob("*.tmp")) or any((folder / "checkpoints").glob("*.old"))


def main(folder: Path, kills: int, seed: int) -> None:
    draw, midway, number = random.Random(seed), 0, 0
    (folder / "digests").mkdir()
    while midway < kills and number < 5 * kills:
        way = {"sharded": number % 2 == 1, "asynchronous": number // 2 % 2 == 1}
        pids = start_ranks(2, partial(train_until_killed, folder, **way), folder / f"store{number}")
        midway += kill_one(folder, pids, draw)
        number += 1
    run_ranks(2, partial(train_until_killed, folder, True, True, steps=1), folder / "last")
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left[0] == "latest" and len(left) == 3, left
    print(f"{midway} of {number} kills fell into a save; {newest_step(folder)} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
