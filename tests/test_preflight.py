"""The check of the machines: what it says of reports, and real processes of which one does not come."""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.preflight import BadNodesError, check_nodes, clock_faults, own_faults
from pretrain.ranks import SINGLE, Ranks
from tests.rank_processes import free_port

ROOT = Path(__file__).parents[1]


def config(seconds: float = 20, **cluster: object) -> Config:
    cfg = load_config(ROOT / "configs/demo.yaml")
    return replace(
        cfg,
        cluster=replace(cfg.cluster, preflight_timeout=seconds, gpus_per_node=0, min_free_gb=0.0, **cluster),
    )


def report(node: str, time: float = 0.0, fault: str = "") -> dict[str, object]:
    return {"node": node, "time": time, "fault": fault}


def test_a_clock_that_differs_is_named() -> None:
    reports = {0: report("a", 100.0), 1: report("b", 130.0), 2: report("c", 1000.0)}
    assert clock_faults(reports) == {"c": "its clock is +870 s from the others'"}
    assert clock_faults({0: report("a", 100.0), 1: report("b", 110.0)}) == {}


def test_the_first_fault_of_each_machine_counts() -> None:
    reports = {
        0: report("a", fault="x"),
        1: report("a", fault="y"),
        2: report("b"),
        3: report("c", fault="z"),
    }
    assert own_faults(reports) == {"a": "x", "c": "z"}


def test_a_full_disk_is_a_fault_of_the_machine_unless_it_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    cfg = replace(cfg, cluster=replace(cfg.cluster, min_free_gb=1e9))
    with pytest.raises(InputError, match=r"^run.dir: .* GB free in .*, below cluster.min_free_gb=1e\+09"):
        check_nodes(cfg, SINGLE)
    monkeypatch.setenv("HOME", "/proc")  # of the cache, which is the machine's own
    with pytest.raises(BadNodesError, match=r": 0.0 GB free in /proc, below cluster.min_free_gb=0.001"):
        check_nodes(replace(cfg, cluster=replace(cfg.cluster, min_free_gb=0.001)), SINGLE)
    assert check_nodes(config(), SINGLE) == []


ONE_EACH = ((0, 1), (0, 1), (0, 1))  # local rank and local number of ranks, by rank
ONE_AND_TWO = ((0, 1), (0, 2), (1, 2))


def _check(rank: int, places: Sequence[tuple[int, int]], port: int, seconds: float, pipe: Connection) -> None:
    import os

    os.environ |= {"SLURM_JOB_NODELIST": "gpu[1-3]", "SLURMD_NODENAME": f"gpu{rank + 1}"}
    try:
        kept = check_nodes(config(seconds), Ranks(rank, 3, *places[rank], "127.0.0.1", port, "slurm"))
    except Exception as error:
        pipe.send((type(error).__name__, str(error), getattr(error, "nodes", [])))
    else:
        pipe.send(("", "", []))
        pipe.recv()  # a rank goes on to train: rank 0's store is there until all have read it
        kept.clear()


def check(
    ranks: list[int], seconds: float, places: Sequence[tuple[int, int]] = ONE_EACH
) -> list[tuple[str, str, list[str]]]:
    """What each of these ranks of three says."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    pipes = [context.Pipe() for _ in ranks]
    processes = [
        context.Process(target=_check, args=(rank, places, port, seconds, pipe[1]))
        for rank, pipe in zip(ranks, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    said = [pipe[0].recv() for pipe in pipes]
    for pipe in pipes:
        pipe[0].send("end")
    for process in processes:
        process.join()
    return said


@pytest.mark.dist
def test_machines_that_are_well_pass_with_unlike_numbers_of_ranks() -> None:
    assert check([0, 1, 2], 60, ONE_AND_TWO) == [("", "", [])] * 3


@pytest.mark.dist
def test_a_machine_that_does_not_come_is_named_by_all() -> None:
    said = check([0, 2], 15)
    assert json.dumps(said) == json.dumps([("BadNodesError", "gpu2: rank 1 does not answer", ["gpu2"])] * 2)
