"""What two ranks that save together must agree on. A script: FOLDER; it prints each check that held."""

import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pretrain.errors import InputError
from pretrain.run.checkpoint import Checkpoints, load_checkpoint
from tests.run.forked import run_ranks

LIMIT = 100_000  # bytes of a file, where a rank's disk is full
State = dict[str, dict[str, Tensor]]


def state_of(value: float, sharded: bool, rows: int = 4) -> State:
    tensors = {f"w{i}": torch.full((rows, 1000), value) for i in range(2)}
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        tensors = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in tensors.items()}
    return {"model": {**tensors, "step": torch.tensor(value)}, "optim": {}}


def loaded(path: Path, sharded: bool) -> float:
    state = state_of(-1, sharded)
    load_checkpoint(path, state)
    value = state["model"]["step"].item()
    for tensor in state["model"].values():
        whole = tensor.full_tensor() if sharded and tensor.ndim else tensor
        assert (whole == value).all()
    return value


def told(value: object) -> list[object]:
    """What each rank has."""
    values: list[object] = [None, None]
    dist.all_gather_object(values, value)
    return values


def disk_full_on(culprit: int, full: bool) -> None:
    if dist.get_rank() == culprit:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT if full else hard, hard))


def a_full_disk(folder: Path, culprit: int, sharded: bool, asynchronous: bool, document: bool) -> None:
    """One rank's disk is full: both are told the same, the last good checkpoint stays, and work goes on."""
    checkpoints = Checkpoints(folder, 3, 0, asynchronous)
    checkpoints.save(1, state_of(1, sharded), {}, {})
    checkpoints.finish()
    disk_full_on(culprit, True)
    error = ""
    try:
        data = {"long": "x" * 2 * LIMIT} if document else {}
        checkpoints.save(2, state_of(2, sharded, 4 if document else 200), data, {})
        if asynchronous:  # the failure is raised by the next call, which does nothing else
            checkpoints.save(3, state_of(3, sharded), {}, {})
    except InputError as caught:
        error = str(caught)
    one, other = told(error)
    assert one == other == error, (one, other)
    assert "saving step 2 failed ([Errno 27] File too large" in error and "\n" not in error, error
    assert f"the last good checkpoint is {folder / 'step_00000001'}." in error
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001"]
    dist.barrier()
    disk_full_on(culprit, False)
    checkpoints.save(4, state_of(4, sharded), {}, {})
    assert checkpoints.newest() == folder / "step_00000004"
    assert loaded(folder / "latest", sharded) == 4


def full_disks(folder: Path) -> None:
    number = 0
    for sharded in (False, True):
        for asynchronous in (False, True):
            for culprit, document in ((0, False), (1, False), (0, True)):
                number += 1
                a_full_disk(folder / str(number), culprit, sharded, asynchronous, document)


def a_folder_that_one_rank_does_not_see(folder: Path) -> None:
    Checkpoints(folder, 3, 0).save(1, state_of(1, False), {}, {})
    try:
        load_checkpoint(folder / "latest" if dist.get_rank() == 0 else folder / "away", state_of(1, False))
        raise AssertionError("loaded")
    except InputError as error:
        assert f"{folder / 'away'}: is not a complete checkpoint" in str(error)


def a_folder_that_rank_0_cannot_make(folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.write_text("a file")
    try:
        Checkpoints(folder / "checkpoints", 3, 0)
        raise AssertionError("made")
    except InputError as error:
        assert "cannot be used for checkpoints" in str(error)


def ranks_that_hold_different_tensors(folder: Path) -> None:
    state = state_of(1, False)
    state["model"][f"only on {dist.get_rank()}"] = torch.ones(1)
    try:
        Checkpoints(folder, 3, 0).save(1, state, {}, {})
        raise AssertionError("saved")
    except RuntimeError as error:
        assert "different names" in str(error)


def plain_tensors_are_written_once_by_both(folder: Path) -> None:
    state = {"model": {f"w{i}": torch.randn(10_000) for i in range(10)}, "optim": {}}
    path = Checkpoints(folder, 3, 0).save(1, state, {}, {})
    sizes = [file.stat().st_size for file in sorted((path / "model").glob("*.distcp"))]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes), sizes
    assert sum(sizes) < 1.2 * 10 * 40_000, sizes


def training_goes_on_while_a_copy_is_written(folder: Path) -> None:
    """Values are those of the call; one save at a time; collectives of both groups run side by side."""
    for sharded in (False, True):
        place = folder / str(sharded)
        with Checkpoints(place, 9, 0, asynchronous=True) as checkpoints:
            state = state_of(0, sharded, 2000)
            for step in range(1, 5):
                for tensor in state["model"].values():
                    tensor.fill_(step)
                path = checkpoints.save(step, state, {}, {"step": step})
                if step > 1:
                    assert (place / f"step_{step - 1:08d}" / "COMPLETE").exists()
                for tensor in state["model"].values():
                    tensor.fill_(-step)  # long before 16 MB are written
                for _ in range(20):
                    dist.all_reduce(torch.ones(1000))
        for step in range(1, 5):
            state = state_of(-1, sharded, 2000)
            load_checkpoint(place / f"step_{step:08d}", state)
            for tensor in state["model"].values():
                assert ((tensor.full_tensor() if sharded and tensor.ndim else tensor) == step).all()
        assert path == place / "step_00000004"


CHECKS = (
    full_disks,
    a_folder_that_one_rank_does_not_see,
    a_folder_that_rank_0_cannot_make,
    ranks_that_hold_different_tensors,
    plain_tensors_are_written_once_by_both,
    training_goes_on_while_a_copy_is_written,
)


def run_checks(folder: Path) -> None:
    for check in CHECKS:
        check(folder / check.__name__)
        dist.barrier()
        if dist.get_rank() == 0:
            print(check.__name__, flush=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    run_ranks(2, lambda: run_checks(target), target / "store")
