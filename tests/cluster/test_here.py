"""Jobs on this machine: the launchers local.py and slurm.py --cluster local|debug, with real processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pretrain.cluster.history import begun
from pretrain.cluster.job_folder import newest_job
from tests.cluster.jobs import new_job
from tests.slurm.runs import (
    ROOT,
    Shell,
    assert_same_end,
    attempts_of,
    losses,
    pid_of,
    step_of,
    wait_until,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.dist]
TWO = ("--procs", "2", "run.steps=16")


def start(shell: Shell, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "launchers/local.py", *arguments]
    return subprocess.Popen(
        command,
        env=shell.environment(),
        cwd=shell.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def listening(pid: int) -> set[str]:
    """The addresses at which a process can be reached."""
    sockets = psutil.Process(pid).net_connections("tcp")
    return {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    printed = Shell(None, folder).run("local.py", write_config(folder, shards), *TWO)
    assert "step 16/16" in printed and f"tensorboard --logdir {folder / 'run'}" in printed
    return folder / "run"


@pytest.mark.drill
def test_a_killed_rank_starts_again(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    shell, run = Shell(None, tmp_path), tmp_path / "run"
    with start(shell, write_config(tmp_path, shards), *TWO) as launcher:
        wait_until(lambda: step_of(run) >= 6, "training")
        os.kill(pid_of(newest_job(run), 1), signal.SIGKILL)
        printed, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0
    first, second = attempts_of(run)
    assert (first.outcome, first.rank, second.outcome) == ("killed", 1, "finished")
    assert "r1_rank00000.log" in printed or "step 16/16" in printed
    assert_same_end(run, undisturbed, 16)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR2,
        pytest.param(signal.SIGINT, marks=pytest.mark.drill),
        pytest.param(signal.SIGTERM, marks=pytest.mark.drill),
    ],
)
def test_a_signal_saves_and_ends(number: signal.Signals, shards: Path, tmp_path: Path) -> None:
    shell, run, config = Shell(None, tmp_path), tmp_path / "run", write_config(tmp_path, shards)
    with start(shell, config, *TWO) as launcher:
        wait_until(lambda: step_of(run) >= 3, "training")
        launcher.send_signal(number)
        printed, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, printed
    (first,) = attempts_of(run)
    assert first.outcome == "stopped" and first.step >= 3
    (status,) = json.loads(shell.run("jobs.py", "status", "--json", run))
    assert (status["state"], status["step"]) == ("stopped", first.step)


def test_jobs_sees_cancels_and_resumes_a_local_run(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    shell, run = Shell(None, tmp_path), tmp_path / "run"
    with start(shell, write_config(tmp_path, shards), *TWO) as launcher:
        wait_until(lambda: step_of(run) >= 3, "training")
        (status,) = json.loads(shell.run("jobs.py", "status", "--json", run))
        assert (status["state"], status["job_id"]) == ("running", str(launcher.pid))
        rank = pid_of(newest_job(run), 1)
        assert psutil.Process(rank).environ()["GLOO_SOCKET_IFNAME"] == "lo"
        assert listening(rank) == {"127.0.0.1"}  # for many a machine's name is another address
        refused = shell.run("local.py", tmp_path / "tiny.yaml", *TWO, status=2)
        assert f"run.dir: job {launcher.pid} is at work on {run}" in refused
        shell.run("jobs.py", "cancel", run)
        launcher.communicate(timeout=60)
    assert launcher.returncode == 75
    assert [attempt.outcome for attempt in attempts_of(run)] == ["cancelled"]
    assert "step 16/16" in shell.run("jobs.py", "resume", run)
    assert_same_end(run, undisturbed, 16)


def test_submitits_local_executor(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    shell, run, config = Shell(None, tmp_path), tmp_path / "run", write_config(tmp_path, shards)
    refused = shell.run("slurm.py", config, "--cluster", "local", status=2)
    assert "cluster.nodes: --cluster local has one machine, not 2" in refused
    shell.run(
        "slurm.py", config, "--cluster", "local", "--nodes", "1", "--gpus-per-node", "2", "run.steps=16"
    )
    assert shell.run("jobs.py", "logs", "-f", run).count("step 16/16") == 1
    (status,) = json.loads(shell.run("jobs.py", "status", "--json", run))
    assert status["state"] == "finished"
    assert_same_end(run, undisturbed, 16)


@pytest.mark.drill
def test_submitits_debug_executor(shards: Path, tmp_path: Path) -> None:
    shell, run, config = Shell(None, tmp_path), tmp_path / "run", write_config(tmp_path, shards)
    one = ("--nodes", "1", "--gpus-per-node", "0", "engine.kind=single", "run.steps=6")
    printed = shell.run("slurm.py", config, "--cluster", "debug", *one)
    assert "step 6/6" in printed and len(losses(run)) == 6
    assert begun(newest_job(run)) == [0]


def test_wrong_input_is_one_line(shards: Path, tmp_path: Path) -> None:
    shell, config = Shell(None, tmp_path), write_config(tmp_path, shards)
    for arguments, line in (
        (["--procs", "0"], "command line: argument --procs: '0' is not a number of processes"),
        (
            ["--procs", "3"],
            "optim.global_batch_size=128 in groups of data.group_size=32 cannot be spread over 3",
        ),
        (
            ["--procs", "8"],
            "optim.global_batch_size=128 in groups of data.group_size=32 cannot be spread over 8",
        ),
    ):
        printed = shell.run("local.py", config, *arguments, status=2)
        assert printed.startswith(f"local.py: {line}") and printed.count("\n") == 1
    assert "no job was started here" in shell.run("jobs.py", "status", tmp_path, status=2)
    assert not (tmp_path / "run").exists()
    new_job(tmp_path / "other")
    printed = shell.run("jobs.py", "logs", tmp_path / "other", "--rank", "4", status=2)
    assert printed == "jobs.py: command line: --rank 4: the job has ranks 0 to 3\n"
