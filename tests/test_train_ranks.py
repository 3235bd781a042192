"""The training loop on two real ranks: who writes what, and how all stop together."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pretrain.cli import main as command_line
from pretrain.config.load import load_config, save_config
from pretrain.errors import InputError
from pretrain.train import main
from tests.rank_processes import ended, free_port, rank_environment, start_ranks

ROOT = Path(__file__).parent.parent


def start(shards: list[Path], folder: Path, *overrides: str) -> list[subprocess.Popen]:
    """Start two ranks on the debugging recipe, 8 images of 16 each; return when steps are done."""
    for rank, data in enumerate(shards):
        settings = [
            f"run.dir={folder}/run",
            "engine.kind=ddp",
            f"data.shards=[{data}/train-*.tar]",
            *("data.workers=0", "data.group_size=4", "data.open_shards=1", "optim.warmup_steps=2"),
            *("optim.global_batch_size=16", "log.every=1", "log.tensorboard=false", "checkpoint.every=1000"),
            *("log.knn.train=[]", "log.knn.test=[]", *overrides),
        ]
        save_config(load_config(ROOT / "configs" / "debug_cpu.yaml", settings), folder / f"{rank}.yaml")
    processes = start_ranks(["-m", "tests.rank_work", "training", str(folder)], folder)
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert processes[0].poll() is None, (folder / "0.err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return processes


def one_of_two(monkeypatch) -> None:
    for name, value in rank_environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)


def test_the_single_engine_refuses_a_second_process(monkeypatch, tmp_path):
    one_of_two(monkeypatch)
    cfg = load_config(ROOT / "configs" / "debug_cpu.yaml", [f"run.dir={tmp_path}/run", "engine.kind=single"])
    message = r"^engine.kind=single trains in one process, not in 2; use engine.kind=ddp"
    with pytest.raises(InputError, match=message):
        main(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_other_engines_refuse_a_single_process(tmp_path, kind):
    cfg = load_config(ROOT / "configs" / "debug_cpu.yaml", [f"run.dir={tmp_path}/run", f"engine.kind={kind}"])
    with pytest.raises(InputError, match=rf"^engine.kind={kind} trains in several processes, not in one"):
        main(cfg)
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_which_rank_complains(monkeypatch, capsys):
    one_of_two(monkeypatch)
    assert command_line(["no_such_config.yaml"]) == 2
    assert capsys.readouterr().err == "pretrain: rank 1: no_such_config.yaml: no such file\n"


def saved_steps(folder: Path) -> list[int]:
    return [int(path.parent.name[5:]) for path in (folder / "run" / "checkpoints").glob("step_*/COMPLETE")]


@pytest.mark.dist
def test_a_signal_to_one_rank_stops_both_at_the_same_step(shards, tmp_path):
    processes = start([shards, shards], tmp_path, "run.steps=100000", "run.preemption_check_every=3")
    processes[1].send_signal(signal.SIGUSR1)
    first, second = ended(processes, tmp_path)
    assert (first.status, second.status) == (75, 75), first.err + second.err
    (step,) = saved_steps(tmp_path)
    assert step % 3 == 0
    assert "stopped by SIGUSR1; saved" in first.out and second.out == second.err == ""
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, step + 1))
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"checkpoints", "config.yaml", "environment.txt", "metrics.jsonl"}


@pytest.mark.dist
def test_data_that_one_rank_cannot_read_end_both_with_a_checkpoint(shards, tmp_path):
    own = tmp_path / "shards"
    shutil.copytree(shards, own)
    processes = start([shards, own], tmp_path, "run.steps=100000")
    for shard in own.glob("train-*.tar"):
        shard.write_bytes(bytes(1024))
    first, second = ended(processes, tmp_path)
    assert (first.status, second.status) == (3, 3), first.err + second.err
    assert "was replaced while it is in use" in second.err
    assert first.err == second.err and first.err.startswith("pretrain: rank 1: ")
    assert len(saved_steps(tmp_path)) == 1
