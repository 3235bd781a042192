"""All accidents on a real Slurm, with what each costs: `make drill` prints the table of docs/slurm.md."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.cluster.history import begun
from pretrain.cluster.job_folder import newest_job
from pretrain.ranks import expand_hosts
from tests.slurm.runs import (
    Shell,
    assert_same_end,
    attempts_of,
    pid_of,
    step_of,
    wait_until,
    write_config,
    write_fault,
    write_pause,
)
from tests.slurm.virtual_cluster import VirtualCluster, temporary_cluster

pytestmark = [pytest.mark.drill, pytest.mark.dist]

Accident = Callable[[VirtualCluster, str, Path], None]
LONGEST = 300  # seconds that a job may take, with all its restarts


def usr2(cluster: VirtualCluster, job: str, run: Path) -> None:
    cluster.run("scancel", "--signal=USR2", job)


def kill_rank(cluster: VirtualCluster, job: str, run: Path) -> None:
    os.kill(pid_of(newest_job(run), 3), signal.SIGKILL)


def preempt(cluster: VirtualCluster, job: str, run: Path) -> None:
    cluster.run(
        "sbatch", "--partition=main", "--nodes=4", "--exclusive", "--wrap=sleep 1", "--output=/dev/null"
    )


def kill_slurmd(cluster: VirtualCluster, job: str, run: Path) -> None:
    """Slurm loses the machine, whose ranks live on until it ends the others."""
    cluster.kill_node(_nodes(cluster, job)[1])


def lose_first_node(cluster: VirtualCluster, job: str, run: Path) -> None:
    """Ranks and batch script are gone at once."""
    cluster.lose_node(_nodes(cluster, job)[0])


def nothing(cluster: VirtualCluster, job: str, run: Path) -> None:
    """It happens by itself."""
    wait_until(lambda: bool(attempts_of(run)), "the end of the first attempt")


def _nodes(cluster: VirtualCluster, job: str) -> list[str]:
    return expand_hosts(cluster.job(job)["NodeList"])


PREEMPTED = "preemption, SIGTERM only, 20 s of grace"
SIGNALLED = "preemption with `preempt_send_user_signal`"
# seconds that are added to a step: Slurm waits for the time limit, or for an answer of a machine
LONG = {
    "time limit": 1.0,
    "`kill -9` of the second machine's slurmd": 3.0,
}
ACCIDENTS: dict[str, tuple[Accident, list[str], str]] = {
    "`scancel --signal=USR2`": (usr2, [], "stopped"),
    "time limit": (nothing, ["--partition=short", "--time=1", "cluster.signal_seconds=45"], "stopped"),
    PREEMPTED: (preempt, ["--partition=low"], "stopped"),
    "SIGKILL of rank 3": (kill_rank, [], "killed"),
    "exception on rank 1 at step 7": (nothing, [], "crashed"),
    "`kill -9` of the second machine's slurmd": (kill_slurmd, [], "stopped"),
    "first machine gone, with ranks and batch script": (lose_first_node, [], "lost"),
}


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The lines of the table, printed after the last accident."""
    found: list[str] = []
    yield found
    head = "| accident | first attempt | starts | seconds until the same step again | steps done twice |"
    manager = request.config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled():
        print("", head, "|---|---|---|---|---|", *found, sep="\n")


@pytest.mark.parametrize("name", ACCIDENTS)
def test_every_accident_ends_in_the_same_weights(
    name: str, cluster: VirtualCluster, reference: Path, shards: Path, tmp_path: Path, rows: list[str]
) -> None:
    _survive(name, cluster, reference, shards, tmp_path, rows)


def test_preemption_with_the_signal_of_the_job(
    slurm: None, reference: Path, shards: Path, tmp_path: Path, rows: list[str]
) -> None:
    """On a cluster that sets preempt_send_user_signal."""
    with temporary_cluster(send_user_signal=True) as cluster:
        _survive(SIGNALLED, cluster, reference, shards, tmp_path, rows)


def _survive(
    name: str, cluster: VirtualCluster, reference: Path, shards: Path, tmp_path: Path, rows: list[str]
) -> None:
    happens, options, outcome = {**ACCIDENTS, SIGNALLED: ACCIDENTS[PREEMPTED]}[name]
    setup = []
    if happens is nothing and outcome == "crashed":
        setup = [write_fault(tmp_path / "event", 0)]
    elif name in LONG:
        setup = [write_pause(tmp_path / "event", LONG[name])]
    run = tmp_path / "run"
    job = Shell(cluster, tmp_path).launch(write_config(tmp_path, shards, setup=setup), *options)
    if happens is not nothing:
        wait_until(lambda: step_of(run) >= 7, "training")
    since, reached = time.monotonic(), step_of(run)
    happens(cluster, job, run)
    if happens is nothing:
        since, reached = time.monotonic() - (time.time() - attempts_of(run)[0].ended), step_of(run)
    wait_until(lambda: begun(newest_job(run))[-1:] != [0], "a second attempt", LONGEST)
    reached = max(reached, step_of(run))
    wait_until(lambda: step_of(run) > reached, "the same step again", LONGEST)
    seconds = time.monotonic() - since
    cluster.wait_for(job, "COMPLETED", LONGEST)
    for node in cluster.nodes:
        if cluster.node_state(node).endswith("*"):
            cluster.start_node(node)
    first, *others = attempts_of(run)
    repeated = reached - others[0].step_before
    rows.append(f"| {name} | {first.outcome} | {len(others) + 1} | {seconds:.0f} | {repeated} |")
    assert_same_end(run, reference)
    assert first.outcome == outcome and others[-1].outcome == "finished"
