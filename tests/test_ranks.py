"""Who am I: every launcher's variables, and each contradiction as one line that names them."""

import pytest

from pretrain.errors import InputError
from pretrain.ranks import SINGLE, Ranks, detect, expand_hosts

EXPLICIT = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "4211",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "gpu[01-04]",
}


def test_torchrun_and_explicit_variables():
    assert detect(EXPLICIT) == Ranks(3, 8, 1, 2, "node1", 29500, "explicit")
    torchrun = {**EXPLICIT, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
    assert detect(torchrun) == Ranks(3, 8, 1, 4, "node1", 29500, "torchelastic")
    assert detect({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1


def test_slurm_tasks():
    assert detect(SLURM) == Ranks(5, 8, 1, 4, "gpu03", 10_000 + (4211 * 7 + 2) % 22_768, "slurm")
    old = {name: value for name, value in SLURM.items() if name not in ("SLURM_NTASKS", "SLURM_STEP_ID")}
    assert detect({**old, "SLURM_NPROCS": "8", "SLURM_STEPID": "2"}) == detect(SLURM)
    chosen = detect({**SLURM, "MASTER_ADDR": "gpu04-ib", "MASTER_PORT": "12345"})
    assert (chosen.master_addr, chosen.master_port) == ("gpu04-ib", 12345)
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "5,3", "SLURM_LOCALID": "2"}
    assert detect({**SLURM, **uneven}).local_world_size == 3


def test_ports_of_neighbouring_jobs_and_steps_differ():
    jobs = [{**SLURM, "SLURM_JOB_ID": str(job)} for job in range(4000, 4100)]
    ports = {detect({**job, "SLURM_STEP_ID": str(step)}).master_port for job in jobs for step in range(7)}
    assert len(ports) == 700 and min(ports) >= 10_000 and max(ports) < 32_768
    restarted = {detect({**SLURM, "SLURM_RESTART_COUNT": str(n)}).master_port for n in range(20)}
    assert len(restarted) == 20  # the port of an attempt may have been taken


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu1"},  # salloc on a login node
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"},  # a batch script
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
    ids=["nothing", "salloc", "batch script", "interactive step"],
)
def test_a_process_that_was_started_alone_is_single(environ):
    assert detect(environ) == SINGLE


def test_torchrun_within_slurm_tasks_has_its_own_number_of_processes():
    tasks = {**SLURM, **EXPLICIT, "WORLD_SIZE": "32", "TORCHELASTIC_RUN_ID": "7"}
    assert detect(tasks).world_size == 32
    assert detect({**SLURM, **EXPLICIT}).source == "explicit"


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in EXPLICIT.items() if key != name}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, r"WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set, but RANK is; set all"),
        (without("RANK"), r"RANK: not set, but WORLD_SIZE, LOCAL_RANK, .* is"),
        (without("MASTER_PORT"), "MASTER_PORT: not set"),
        ({**EXPLICIT, "RANK": "8"}, r"RANK=8 is not below WORLD_SIZE=8; ranks count from 0"),
        ({**EXPLICIT, "RANK": "two"}, r"RANK=two is not a whole number; set it right"),
        ({**EXPLICIT, "WORLD_SIZE": "-1"}, r"WORLD_SIZE=-1 is not a whole number"),
        ({**EXPLICIT, "LOCAL_WORLD_SIZE": "1"}, r"LOCAL_RANK=1 is not below LOCAL_WORLD_SIZE=1"),
        ({**EXPLICIT, "MASTER_PORT": "70000"}, r"MASTER_PORT=70000 is not a port"),
        ({**SLURM, **EXPLICIT, "WORLD_SIZE": "16"}, r"WORLD_SIZE=16, but Slurm started SLURM_NTASKS=8 tasks"),
        ({**SLURM, "SLURM_PROCID": "8"}, r"SLURM_PROCID=8 is not below SLURM_NTASKS=8"),
        ({**SLURM, "SLURM_NTASKS": "many"}, r"SLURM_NTASKS=many is not a whole number"),
        (
            {**SLURM, "SLURM_STEP_NODELIST": "gpu[1"},
            "SLURM_STEP_NODELIST='gpu.1' is not a list",
        ),
    ],
)
def test_contradictions_are_one_line_with_the_names(environ, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        detect(environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu[03-05,7],login1", ["gpu03", "gpu04", "gpu05", "gpu7", "login1"]),
        ("node7", ["node7"]),
        ("a,b-1.cluster", ["a", "b-1.cluster"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[01,03]-ib", ["r1n01-ib", "r1n03-ib", "r2n01-ib", "r2n03-ib"]),
    ],
)
def test_host_lists(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "gpu[", "gpu[1-]", "gpu]1[", "gpu[a-b]"])
def test_damaged_host_lists_are_refused(text):
    with pytest.raises(InputError, match="set MASTER_ADDR"):
        expand_hosts(text)
