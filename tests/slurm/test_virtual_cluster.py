"""The virtual cluster that the tests of Slurm stand on: what it promises, and what it leaves behind."""

import os
import shutil
import time
from pathlib import Path

import pytest

from tests.slurm.virtual_cluster import SlurmError, VirtualCluster, temporary_cluster, unavailable

pytestmark = pytest.mark.dist

HOSTS = Path("/etc/hosts")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
RESTARTS = 'echo "begun ${SLURM_RESTART_COUNT:-0}"; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60'


def submit(cluster: VirtualCluster, folder: Path, script: str, *options: str) -> str:
    """The number of a job that writes to JOB.out in the folder."""
    written = [f"--output={folder}/%j.out", "--open-mode=append"]
    return cluster.run("sbatch", "--parsable", *written, *options, "--wrap", script).strip()


def lines(folder: Path, job: str) -> list[str]:
    return sorted((folder / f"{job}.out").read_text().splitlines())


def wait_until_begun(folder: Path, job: str, tasks: int = 1) -> None:
    """Slurm calls a job RUNNING already before; its tasks say so themselves."""
    output, deadline = folder / f"{job}.out", time.monotonic() + 30
    while not output.exists() or output.read_text().count("begun") < tasks:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_gets_nodes_ranks_and_gpus(cluster: VirtualCluster, tmp_path: Path) -> None:
    script = "srun sh -c 'echo $SLURMD_NODENAME $SLURM_PROCID $CUDA_VISIBLE_DEVICES'"
    job = submit(cluster, tmp_path, script, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    assert cluster.wait_for(job, ENDED) == "COMPLETED"
    first, second = cluster.nodes[:2]
    assert lines(tmp_path, job) == [f"{first} 0 0,1", f"{first} 1 0,1", f"{second} 2 0,1", f"{second} 3 0,1"]


def test_a_requeued_job_restarts(cluster: VirtualCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, RESTARTS, "--requeue")
    wait_until_begun(tmp_path, job)
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait_for(job, ENDED) == "COMPLETED"
    assert {"begun 0", "begun 1"} < {*lines(tmp_path, job)}  # beside what slurmstepd says
    assert cluster.job(job)["Restarts"] == "1"


def test_a_job_is_described_and_waited_for(cluster: VirtualCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "sleep 60", "--job-name=two words", "--partition=short")
    cluster.wait_for(job, ["RUNNING"])
    described = cluster.job(job)
    assert (described["JobId"], described["JobName"]) == (job, "two words")
    assert (described["Partition"], described["TimeLimit"]) == ("short", "00:01:00")
    with pytest.raises(TimeoutError, match=r"not COMPLETED after 0\.2 s"):
        cluster.wait_for(job, "COMPLETED", seconds=0.2)
    cluster.run("scancel", job)
    assert cluster.wait_for(job, ENDED) == "CANCELLED"


def test_a_command_that_fails_says_why(cluster: VirtualCluster) -> None:
    with pytest.raises(SlurmError, match="invalid partition"):
        cluster.run("sbatch", "--partition=none", "--wrap", "true")


def test_a_killed_node_loses_its_job_and_comes_back(cluster: VirtualCluster, tmp_path: Path) -> None:
    name = cluster.nodes[-1]
    job = submit(cluster, tmp_path, "echo begun; sleep 60", f"--nodelist={name}", "--no-requeue")
    wait_until_begun(tmp_path, job)
    cluster.kill_node(name)
    cluster.run("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")  # without the wait
    assert cluster.node_state(name).startswith("down")
    cluster.start_node(name)
    assert cluster.wait_for(job, ENDED) == "NODE_FAIL"
    assert cluster.node_state(name) == "idle"


def test_two_clusters_are_apart_and_one_that_stops_leaves_nothing(
    cluster: VirtualCluster, tmp_path: Path
) -> None:
    with temporary_cluster(nodes=2) as other:
        job = submit(other, tmp_path, "srun --nodes=2 sh -c 'echo begun; sleep 60'", "--nodes=2")
        wait_until_begun(tmp_path, job, tasks=2)
        other.kill_node(other.nodes[1])  # its tasks have no slurmd to end them
        with pytest.raises(SlurmError, match="Invalid job id"):
            cluster.job(job)
        assert str(other.root) in HOSTS.read_text()
        assert len(other.processes()) > len(["munged", "slurmctld", "slurmd"])
    assert str(other.root) not in HOSTS.read_text()
    assert (other.processes(), other.root.exists()) == ([], False)
    assert cluster.node_state(cluster.nodes[0]) == "idle"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name in ("slurmd", "munged") else f"/{name}")
    assert unavailable() == "no slurmd munged: install the packages slurmctld slurmd slurm-client munge"
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    assert unavailable() == "Slurm's daemons must be started by root"
