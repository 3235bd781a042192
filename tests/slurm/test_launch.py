"""The launchers as a person uses them: refusals, a chain of jobs, cancel and resume, status and logs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.runs import ROOT, Shell, assert_same_end, attempts_of, step_of, wait_until, write_config
from tests.slurm.virtual_cluster import VirtualCluster

pytestmark = [pytest.mark.slow, pytest.mark.dist]

REFUSED = {
    "config": (["optim.lr=-1"], "command line: optim.lr: must be above 0, got -1.0"),
    "nodes": (["--nodes", "8", "optim.global_batch_size=512"], "sbatch: allocation failure: "),
    "batch": (
        ["--nodes", "3"],
        "optim.global_batch_size=128 in groups of data.group_size=32 cannot be spread over 6",
    ),
    "shard": (["data.shards=/nowhere/train-0.tar"], "data.shards: no shard /nowhere/train-0.tar"),
    "folder": (["--run-dir", "/proc/run"], "run.dir: /proc/run: cannot write in /proc"),
    "time": (
        ["--partition", "short", "--time", "10"],
        "cluster.time: 10 is longer than partition short allows",
    ),
    "partition": (["--partition", "none"], "sbatch: invalid partition specified: none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(
    case: str, cluster: VirtualCluster, shards: Path, tmp_path: Path
) -> None:
    arguments, line = REFUSED[case]
    config = write_config(tmp_path, shards)
    before, jobs = sorted(tmp_path.rglob("*")), cluster.run("squeue", "-h")
    printed = Shell(cluster, tmp_path).run("slurm.py", config, *arguments, status=2)
    assert printed.startswith(f"slurm.py: {line}") and printed.count("\n") == 1
    assert (sorted(tmp_path.rglob("*")), cluster.run("squeue", "-h")) == (before, jobs)


def test_a_dry_run_prints_the_whole_script(cluster: VirtualCluster, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, shards)
    before = sorted(tmp_path.rglob("*"))
    printed = Shell(cluster, tmp_path).run("slurm.py", config, "--dry-run", "--images-per-s", "100")
    script, _, estimate = printed.partition(
        "# 24 steps x 128 images = 3,072 images on 4 GPUs at 100 images/s"
    )
    assert script.startswith("#!/bin/bash\n# Made by")
    assert "\nsrun --kill-on-bad-exit=1 --wait=60" in script and "#SBATCH --signal=USR2@30\n" in script
    assert estimate.startswith(" each: 0.0 GPU-hours, 0:00:08 ")
    assert sorted(tmp_path.rglob("*")) == before
    path = tmp_path / "script.sh"
    path.write_text(printed)
    assert "to start at" in estimate and cluster.run("sbatch", "--test-only", path) == ""


def test_the_launcher_imports_no_torch() -> None:
    code = "import sys; sys.path[0] = 'launchers'; import slurm; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.drill
def test_a_chain_of_two_jobs(cluster: VirtualCluster, shards: Path, tmp_path: Path) -> None:
    """The second job trains on for more steps once the first has finished, and not before."""
    shell, config, run = Shell(cluster, tmp_path), write_config(tmp_path, shards), tmp_path / "run"
    first = shell.launch(config, "run.steps=6")
    refused = shell.run("slurm.py", config, status=2)
    assert f"job {first} is at work on {run}; cancel it" in refused
    second = shell.launch(config, "run.steps=12", f"--dependency=afterok:{first}")
    (status,) = json.loads(shell.run("jobs.py", "status", "--json", run))
    assert (status["job_id"], status["followers"]) == (first, [second])
    assert f"{first}, then {second}" in shell.run("jobs.py", "status", run)
    cluster.wait_for(second, "COMPLETED", 120)
    assert cluster.job_state(first) == "COMPLETED"
    attempt = attempts_of(run)[-1]
    assert (attempt.step_before, attempt.step, attempt.outcome) == (6, 12, "finished")
    assert "run.dir:" in shell.run("slurm.py", config, "run.steps=12", status=2)  # never restarted


def test_cancel_and_resume_while_another_shell_watches(
    cluster: VirtualCluster, reference: Path, shards: Path, tmp_path: Path
) -> None:
    shell, other, run = Shell(cluster, tmp_path), Shell(cluster, ROOT), tmp_path / "run"
    job = shell.launch(write_config(tmp_path, shards))
    command = [sys.executable, ROOT / "launchers/jobs.py", "logs", "-f", run]
    with subprocess.Popen(command, env=other.environment(), stdout=subprocess.PIPE, text=True) as watcher:
        wait_until(lambda: step_of(run) >= 7, "training")
        (status,) = json.loads(other.run("jobs.py", "status", "--json", run))
        assert (status["job_id"], status["state"], status["steps"]) == (job, "running", 24)
        assert status["step"] >= 7 and status["loss"] > 0 and status["images_per_s"] > 0
        assert len(status["nodes"]) == 2
        other.run("jobs.py", "cancel", run)
        cluster.wait_for(job, ("FAILED", "CANCELLED", "COMPLETED"), 60)
        seen, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 0 and "step 7/24" in seen and "stopped by SIGUSR2; saved" in seen
    cancelled = attempts_of(run)[-1]
    assert cancelled.outcome == "cancelled" and cancelled.step > 7
    assert "cancelled" in other.run("jobs.py", "status", run)
    assert "is over; nothing to cancel" in other.run("jobs.py", "cancel", run, status=2)
    resumed = other.run("jobs.py", "resume", run).split()[1]
    cluster.wait_for(resumed, "COMPLETED", 120)
    assert attempts_of(run)[-1].step_before == cancelled.step
    assert_same_end(run, reference)
    assert "step 24/24" in other.run("jobs.py", "logs", run)


def test_a_plain_scancel_ends_the_job_for_good(cluster: VirtualCluster, shards: Path, tmp_path: Path) -> None:
    shell, run = Shell(cluster, tmp_path), tmp_path / "run"
    job = shell.launch(write_config(tmp_path, shards))
    wait_until(lambda: step_of(run) >= 3, "training")
    cluster.run("scancel", job)
    assert cluster.wait_for(job, ("CANCELLED", "PENDING", "COMPLETED"), 60) == "CANCELLED"
    time.sleep(2)  # the script's last words
    assert cluster.job_state(job) == "CANCELLED"
    (status,) = json.loads(shell.run("jobs.py", "status", "--json", run))
    assert status["state"] in ("cancelled", "stopped")


@pytest.mark.drill
def test_a_bad_machine_is_named_and_left_out(cluster: VirtualCluster, shards: Path, tmp_path: Path) -> None:
    """The cache of node1 lies on a disk without room."""
    prolog = tmp_path / "prolog.sh"
    prolog.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" = node1 ] && echo export HOME=/proc\nexit 0\n')
    prolog.chmod(0o755)
    config = write_config(tmp_path, shards, setup=[f"export SLURM_TASK_PROLOG={prolog}"])
    shell, run = Shell(cluster, tmp_path), tmp_path / "run"
    job = shell.launch(config, "run.steps=6")
    cluster.wait_for(job, "COMPLETED", 120)
    first, second = attempts_of(run)
    assert (first.outcome, first.bad_nodes) == ("bad node", ["node1"])
    assert "node1" not in second.nodes and second.outcome == "finished"
