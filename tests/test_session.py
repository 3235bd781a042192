"""Real ranks meet, agree, fail and hang: all end with one status, and a line says why."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain import session as sessions
from pretrain.config.schema import EngineConfig
from pretrain.errors import InputError, TrainingError
from pretrain.ranks import Ranks
from pretrain.session import pick_device, session
from tests.rank_processes import LIMIT, ROOT, Ended, free_port, rank_environment, run_ranks


def work(name: str, folder: Path) -> list[Ended]:
    return run_ranks(["-m", "tests.rank_work", name, str(folder)], folder)


def test_one_process_starts_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with session(EngineConfig(device="cpu")) as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()


@pytest.mark.dist
def test_ranks_agree_on_sums_means_and_when_to_stop(tmp_path):
    ended = work("agreements", tmp_path)
    assert [(e.status, e.err) for e in ended] == [(0, ""), (0, "")]
    assert ended[0].out.startswith("said once\n") and "said" not in ended[1].out
    for rank, found in enumerate(json.loads(e.out.splitlines()[-1]) for e in ended):
        assert found.pop("ranks") == [rank, 2, rank == 0, "cpu"]
        assert found == {
            "sum": [2.0, 1.0],
            "max": [1.0, 0.0],
            "any": [True, False],
            "largest": 11,
            "means": {"loss": "3.0", "norm": "0.5", "never": "nan"},
            "stops": [3, "stopped by SIGUSR1", 4, "stopped by SIGUSR1"],
        }


@pytest.mark.dist
def test_torchrun_starts_ranks(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.rank_work", "agreements", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *torchrun, *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(one["ranks"][0] for one in found) == [0, 1]
    assert all(one["sum"] == [2.0, 1.0] for one in found)


MISSING = "data.shards: /d/7.tar: no such file; check the path"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "status", "first", "second"),
    [
        ("input_error", 2, f"pretrain: rank 1: {MISSING}\n", f"pretrain: rank 1: {MISSING}\n"),
        ("training_error", 3, "pretrain: 10 steps in a row were skipped\n", ""),
    ],
)
def test_a_failing_rank_ends_all_with_its_line(tmp_path, name, status, first, second):
    ended = work(name, tmp_path)
    assert [e.status for e in ended] == [status, status]
    assert [e.err for e in ended] == [first, second]


@pytest.mark.dist
def test_ranks_with_the_same_error_all_end_with_it(tmp_path):
    ended = work("same_error", tmp_path)
    assert [e.status for e in ended] == [2, 2]
    assert ended[0].err.endswith("data.shards: names no shard\n") and ended[0].err.count("\n") == 1
    assert ended[1].err in ("", "pretrain: rank 1: data.shards: names no shard\n")


@pytest.mark.dist
def test_a_bug_on_one_rank_shows_its_traceback_and_ends_all(tmp_path):
    ended = work("traceback", tmp_path)
    assert [e.status for e in ended] == [1, 1]
    assert ended[0].err.startswith("pretrain: rank 1: ZeroDivisionError: unforeseen; the traceback")
    assert ended[0].err.count("\n") == 1
    assert "ZeroDivisionError: unforeseen\n" in ended[1].err and "Traceback" in ended[1].err


@pytest.mark.dist
def test_an_agreed_error_is_raised_by_all_after_their_save(tmp_path):
    ended = work("agreed_error", tmp_path)
    assert [(e.status, e.err) for e in ended] == [(3, "pretrain: rank 1: /d/7.tar: cannot be read\n")] * 2
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("name", "victim"), [("killed", 1), ("first_killed", 0)])
def test_a_killed_rank_ends_the_other(tmp_path, name, victim):
    ended = work(name, tmp_path)
    other = ended[1 - victim]
    assert (ended[victim].status, other.status) == (-signal.SIGKILL, 3)
    prefix = "" if victim else "rank 1: "  # torch itself has much to say about the loss of rank 0's store
    last = other.err.splitlines()[-1]
    assert last.startswith(f"pretrain: {prefix}another rank ended without a word")


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_that_hang_write_their_stacks_and_end(tmp_path):
    ended = work("hang", tmp_path)
    assert [e.status for e in ended] == [3, 3]
    for rank, (status, _, err) in enumerate(ended):
        path = tmp_path / "stacks" / f"rank_{rank:05}.txt"
        stacks = path.read_text()
        assert ("stuck_here" in stacks) == (rank == 1)
        assert "in hang" in stacks and f"rank {rank}, process " in stacks
        assert f"stacks of all threads: {path}\n" in err and status == 3
    assert "no answer from another rank for engine.timeout=4 s" in ended[0].err


def in_environment(monkeypatch, **changes: str) -> None:
    for name, value in {**rank_environment(1, 2, free_port()), **changes}.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)


def test_ranks_that_do_not_come_are_named(monkeypatch):
    in_environment(monkeypatch, RANK="0", LOCAL_RANK="0", WORLD_SIZE="3")
    with (
        pytest.raises(TrainingError, match="of 3 ranks, these did not start within 1 s: 1, 2"),
        session(EngineConfig(device="cpu", timeout=1.0, hang_timeout=0.0)),
    ):
        pytest.fail("started")


def test_a_first_rank_that_cannot_be_reached_is_named(monkeypatch):
    in_environment(monkeypatch)
    with (
        pytest.raises(InputError, match=r"^MASTER_ADDR=127.0.0.1 MASTER_PORT=\d+: rank 0's store cannot be"),
        session(EngineConfig(device="cpu", timeout=1.0, hang_timeout=0.0)),
    ):
        pytest.fail("started")


@pytest.mark.parametrize(
    ("ranks", "gpus", "device"),
    [
        (Ranks(3, 8, 3, 4, "node", 1, "torchelastic"), 4, "cuda:3"),
        (Ranks(3, 8, 3, 4, "node", 1, "slurm"), 1, "cuda:0"),  # each task sees its own
        (Ranks(3, 8, 3, 4, "node", 1, "torchelastic"), 2, "LOCAL_RANK=3 .torchelastic., but .* 2 GPU"),
        (Ranks(0, 1, 0, 1, "node", 1, "single"), 1, "cuda"),
    ],
)
def test_the_device_is_that_of_the_local_rank(monkeypatch, ranks, gpus, device):
    chosen: list[int] = []
    monkeypatch.setattr(sessions.torch.cuda, "is_available", lambda: True)  # this machine may have none
    monkeypatch.setattr(sessions.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sessions.torch.cuda, "set_device", chosen.append)
    if device.startswith("cuda"):
        assert pick_device("auto", ranks) == torch.device(device)
        assert chosen == ([int(device[5:])] if ":" in device else [])
    else:
        with pytest.raises(InputError, match=device):
            pick_device("cuda", ranks)
