"""A real Slurm on one host, without systemd and cgroups, on the loopback only: for tests, and to play with.

    python -m tests.slurm.virtual_cluster DIR [--nodes N]

runs one in the folder DIR, which must be new or empty, until Ctrl-C or SIGTERM. It takes root.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.slurm.slurm_files import Plan, add_to_hosts, free_ports, listens, remove_from_hosts, write_files

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")
UP = {"idle", "plnd", "mix", "alloc", "comp"}  # of a node that answers; one that does not has a star behind


class SlurmError(RuntimeError):
    """A command failed, or a daemon did not come up."""


def unavailable() -> str:
    """Why a virtual cluster cannot run here, or nothing."""
    if sys.platform != "linux":
        return "Slurm runs on Linux only"
    if os.geteuid() != 0:
        return "Slurm's daemons must be started by root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    packages = "install the packages slurmctld slurmd slurm-client munge"
    return f"no {' '.join(missing)}: {packages}" if missing else ""


class VirtualCluster:
    """munged, slurmctld and `nodes` slurmd in the folder `root`, whose path must be short.

    Every node believes to have `cpus` CPUs and `gpus` GPUs. Partitions: main, of high priority; low, which
    main preempts by a requeue after 20 seconds; short, of two minutes at most. With `send_user_signal` a
    preempted job gets the signal that it asked for with --signal at once; else its steps get SIGTERM at once,
    and its batch script nothing until the 20 seconds are over.
    """

    def __init__(
        self, root: Path, nodes: int = 4, cpus: int = 8, gpus: int = 8, send_user_signal: bool = True
    ) -> None:
        names = [f"node{number}" for number in range(1, nodes + 1)]
        self.plan = Plan(root.resolve(), names, free_ports(nodes + 1), cpus, gpus, send_user_signal)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def root(self) -> Path:
        return self.plan.root

    @property
    def nodes(self) -> list[str]:
        return self.plan.nodes

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        return {"SLURM_CONF": str(self.plan.conf)}

    def __enter__(self) -> Self:
        write_files(self.plan)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()

    def _start(self) -> None:
        add_to_hosts(self.plan)
        munge = self.root / "munge"
        options = {"socket": self.plan.socket, "key-file": munge / "key", "pid-file": munge / "pid"}
        options |= {"seed-file": munge / "seed", "log-file": self.root / "log" / "munged.log"}
        self._spawn(
            "munged", "munged", "--foreground", *(f"--{name}={path}" for name, path in options.items())
        )
        self._until(self.plan.socket.is_socket, "munged")
        self._spawn("slurmctld", "slurmctld", "-D")
        self._until(lambda: "is UP" in self.run("scontrol", "ping"), "slurmctld")
        for name in self.nodes:
            self._spawn(name, "slurmd", "-D", "-N", name)
        self._until(lambda: all(map(self._answers, self.nodes)), "slurmd")

    def _spawn(self, name: str, *command: str) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                env={**_outside(), **self.environment, **self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                umask=0o022,
            )

    @property
    def _mark(self) -> dict[str, str]:
        """What slurmstepds inherit from their slurmd, and nothing else has."""
        return {"VIRTUAL_CLUSTER": str(self.root)}

    def _until(self, condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not _true(condition):
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise SlurmError(f"{what} did not come up; ended: {ended}\n{self._last_words()}")
            time.sleep(0.05)

    def _last_words(self) -> str:
        logs = sorted((self.root / "log").iterdir())
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-600:]}" for path in logs)

    def run(self, *command: str | Path, seconds: float = 60) -> str:
        """What a command prints, run in the folder of the cluster."""
        done = subprocess.run(
            command,
            env={**_outside(), **self.environment},
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if done.returncode:
            raise SlurmError(f"{command} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, job_id: int | str) -> dict[str, str]:
        """What `scontrol show job` says; of an array, about its first line."""
        line = self.run("scontrol", "show", "job", "-o", str(job_id)).splitlines()[0].strip()
        return dict(field.split("=", 1) for field in re.split(r" (?=[A-Z][\w:/]*=)", line))

    def job_state(self, job_id: int | str) -> str:
        return self.job(job_id)["JobState"]

    def wait_for(self, job_id: int | str, states: Collection[str], seconds: float = 60) -> str:
        """Wait until a job is in one of the states, or in the one state; which.

        A job is RUNNING a little before its script starts.
        """
        wanted = {states} if isinstance(states, str) else {*states}
        deadline = time.monotonic() + seconds
        while (job := self.job(job_id))["JobState"] not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not {' or '.join(sorted(wanted))} after {seconds} s: {job}")
            time.sleep(0.1)
        return job["JobState"]

    def node_state(self, name: str) -> str:
        """Such as idle, alloc, down* (does not answer), in the short words of sinfo."""
        return self.run("sinfo", "-h", "-p", "main", "-n", name, "-o", "%t").strip()

    def kill_node(self, name: str) -> None:
        """Kill a slurmd; its slurmstepds and their tasks live on, as when one crashes."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def lose_node(self, name: str) -> None:
        """Kill all that runs on a node, as when its power fails."""
        self.kill_node(name)
        tasks = [pid for pid in self.processes() if f"SLURMD_NODENAME={name}".encode() in _environment(pid)]
        parents = [int(_status(pid, "PPid") or 0) for pid in tasks]
        for pid in {*tasks, *(pid for pid in parents if _status(pid, "Name") == "slurmstepd")}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start a killed slurmd again, until the node is up."""
        self._spawn(name, "slurmd", "-D", "-N", name)
        self._until(lambda: self._answers(name), name)

    def _answers(self, name: str) -> bool:
        """Whether a node is up; its state alone does not tell until slurmctld notices that it was killed."""
        port = self.plan.ports[1 + self.nodes.index(name)]
        return listens(port) and self.node_state(name) in UP

    def stop(self) -> None:
        """End all jobs and daemons; the folder stays."""
        with suppress(SlurmError, subprocess.TimeoutExpired):  # what it cannot end is killed below
            self._cancel_jobs()
        for names in (self.nodes, ["slurmctld"], ["munged"]):
            _end([self._daemons.pop(name) for name in names if name in self._daemons])
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        remove_from_hosts(self.plan)

    def _cancel_jobs(self) -> None:
        alive = ",".join(name for name in self.nodes if name in self._daemons)
        if not alive:
            return
        jobs = self.run("squeue", "-h", "-o", "%A", seconds=10).split()
        if jobs:
            self.run("scancel", *jobs, seconds=10)
        deadline = time.monotonic() + 8  # KillWait and a bit
        while self.run("squeue", "-h", "-w", alive, seconds=10) and time.monotonic() < deadline:
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """The daemons, slurmstepds and tasks of the cluster that live, killed nodes' included."""
        return [int(path.name) for path in Path("/proc").glob("[1-9]*") if self._owns(path)]

    def _owns(self, process: Path) -> bool:
        held = _environment(int(process.name))
        conf, mark = (
            os.fsencode(f"{key}={value}")
            for mapping in (self.environment, self._mark)
            for key, value in mapping.items()
        )
        return mark in held or (conf in held and any(part.startswith(b"SLURMD_NODENAME=") for part in held))


@contextmanager
def temporary_cluster(nodes: int = 4, send_user_signal: bool = False) -> Iterator[VirtualCluster]:
    """A cluster in a temporary folder of a short path, which goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="vs"))
    try:
        with VirtualCluster(folder, nodes, send_user_signal=send_user_signal) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder)


def _outside() -> dict[str, str]:
    """The environment without what a job of another cluster, or its user, tells Slurm's commands."""
    slurms = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SCONTROL_", "SCANCEL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(slurms)}


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile
        return []


def _status(pid: int, field: str) -> str:
    """A line of the process table; empty when the process has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return line.split()[1]
    return ""


def _true(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except SlurmError:
        return False


def _end(daemons: list[subprocess.Popen[bytes]]) -> None:
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        try:
            daemon.wait(2)  # slurmctld takes longer while it looks for a killed node, for nothing
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    arguments = parser.parse_args()
    if reason := unavailable():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), VirtualCluster(arguments.dir, arguments.nodes) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main()
