"""One process of a job, started as torchrun would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.config.load import load_config, save_config
from pretrain.records import Record, read_records
from tests.cluster.jobs import new_job
from tests.rank_processes import free_port

ROOT = Path(__file__).parents[1]


def start(tmp_path: Path, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A rank of two whose peer never comes; the folder of its attempt."""
    folder = new_job(tmp_path)
    save_config(
        load_config(ROOT / "configs/demo.yaml", ["engine.kind=ddp", "data.group_size=64"]), folder.config
    )
    place = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain.job", folder.path],
        cwd=ROOT,
        env={**os.environ, **place, **environment},
    )
    return process, folder.attempt(0)


def record(attempt: Path, rank: int) -> Record | None:
    return read_records(attempt).get(rank)


@pytest.mark.dist
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_ends_a_process_that_waits_for_others(rank: str, tmp_path: Path) -> None:
    process, attempt = start(tmp_path, RANK=rank)
    while record(attempt, int(rank)) is None:
        time.sleep(0.05)
    time.sleep(5)  # it has imported torch, and waits
    process.send_signal(signal.SIGUSR2)
    assert process.wait(5) == 0  # nobody is to be killed for it
    told = record(attempt, int(rank))
    assert told is not None and (told.status, told.line, told.signature) == (75, "told to end", "no save")
    assert (attempt.parents[1] / "logs" / f"r0_rank0000{rank}.log").exists()


def test_a_config_that_is_gone_is_one_line_in_its_log_and_record(tmp_path: Path) -> None:
    process, attempt = start(tmp_path, RANK="0", WORLD_SIZE="1")
    (attempt.parents[1] / "config.yaml").unlink()
    assert process.wait(30) == 2
    told = record(attempt, 0)
    assert (
        told is not None and told.status == 2 and told.line.endswith("config.yaml: No such file or directory")
    )
    assert told.is_cause and told.signature.startswith("ConfigError at load.py:")
