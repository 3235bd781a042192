"""A check of every machine before the training starts: a broken one is named, instead of hanging all others.

Each process looks at its own machine, then all meet at rank 0, compare clocks, and add up numbers, first
within each machine, then across all. There is one deadline; rank 0 sees who is missing when it is over.
"""

import json
import os
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed has them too, untyped

from pretrain.config.schema import Config
from pretrain.errors import InputError, TrainingError
from pretrain.ranks import Ranks, expand_hosts
from pretrain.records import node_name
from pretrain.session import pick_device

NUMBERS = 1 << 20  # added up over the processes: 4 MiB
CLOCK_SECONDS = 60.0  # that a machine's clock may differ from the others'
VERDICT_SECONDS = 30.0  # for rank 0 to think, after the deadline of the work
READ_SECONDS = 5.0  # for the others to read what it thinks

Faults = Mapping[str, str]  # machine -> what is wrong with it


class BadNodesError(TrainingError):
    """Machines that cannot take part."""

    def __init__(self, faults: Faults) -> None:
        super().__init__("; ".join(f"{node}: {fault}" for node, fault in sorted(faults.items())))
        self.nodes = sorted(faults)


def check_nodes(cfg: Config, ranks: Ranks) -> list[Store]:
    """Check this machine, and with the other processes all of them; collective.

    Returns:
        What must be kept until the process ends: the place where the ranks have met.

    Raises:
        BadNodesError: machines are named that failed.
        TrainingError: the machines cannot talk to one another, and none can be blamed.
        InputError: the config asks for a device that is not there, or the run's disk is full.
    """
    if shared := _full(Path(cfg.run.dir), cfg.cluster.min_free_gb):
        raise InputError(f"run.dir: {shared}")
    fault = _own_fault(cfg, ranks)
    if ranks.world_size == 1 or ranks.source == "torchelastic":  # one machine, whose agent watches
        if fault:
            raise BadNodesError({node_name(): fault})
        return []
    meeting = Meeting(ranks, cfg.cluster.preflight_timeout)
    meeting.check("start", lambda: fault)
    meeting.check("clock", lambda: "", clocks=True)
    device = pick_device(cfg.engine.device, ranks)
    for name, size, rank, group in (
        ("machine", ranks.local_world_size, ranks.local_rank, ranks.rank - ranks.local_rank),
        ("network", ranks.world_size, ranks.rank, 0),
    ):
        meeting.check(name, partial(_add_up, meeting, f"{name}{group}", rank, size, device))
    return [meeting.store]


def _own_fault(cfg: Config, ranks: Ranks) -> str:
    """What is wrong with this machine, as far as it can tell alone; empty when all is well."""
    wants_gpu = cfg.cluster.gpus_per_node > 0 and cfg.engine.device != "cpu" and ranks.source == "slurm"
    if wants_gpu and not torch.cuda.is_available():
        return "no GPU is visible"
    try:
        device = pick_device(cfg.engine.device, ranks)
        if float(torch.ones(64, 64, device=device).sum()) != 64 * 64:
            return f"{device} adds up wrongly"
        socket.getaddrinfo(ranks.master_addr, None)
    except (RuntimeError, OSError) as error:
        return " ".join(str(error).split())
    places = [Path(tempfile.gettempdir()), Path(cfg.data.cache.dir).expanduser()]
    return next((fault for place in places if (fault := _full(place, cfg.cluster.min_free_gb))), "")


def _full(place: Path, min_free_gb: float) -> str:
    """Whether the disk of a folder, which may not be there yet, is nearly full."""
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    return (
        f"{free:.1f} GB free in {there}, below cluster.min_free_gb={min_free_gb:g}"
        if free < min_free_gb
        else ""
    )


class Meeting:
    """All ranks at rank 0, through a store beside the one of the training."""

    def __init__(self, ranks: Ranks, seconds: float) -> None:
        """Connect.

        Args:
            ranks: who this process is.
            seconds: for the whole check.

        Raises:
            BadNodesError: rank 0's machine cannot be reached.
        """
        self.ranks, self.deadline = ranks, time.monotonic() + seconds
        address = (ranks.master_addr, ranks.master_port + 1)
        limit = timedelta(seconds=seconds)
        try:
            tcp = TCPStore(*address, is_master=ranks.rank == 0, timeout=limit, wait_for_workers=False)
        except (dist.DistError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise BadNodesError({ranks.master_addr: f"rank 0 cannot be reached there ({reason})"}) from error
        self.store: Store = PrefixStore("preflight", tcp)

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return max(self.deadline - time.monotonic(), 0.0)

    def check(self, name: str, work: Callable[[], str], clocks: bool = False) -> None:
        """Let every rank do a piece of work, and end all where one finds a fault or does not answer.

        Args:
            name: of the piece.
            work: says what is wrong, or nothing; one that does not end is given up at the deadline.
            clocks: whether to compare the time at which the ranks pass this point.
        """
        if clocks:
            self._pass_together(name)
        report = {"node": node_name(), "fault": _within(self.left, work), "time": time.time()}
        self.store.set(f"{name}_{self.ranks.rank}", json.dumps(report))
        if self.ranks.rank == 0:
            reports = self._reports(name)
            faults = self._missing(reports) | own_faults(reports) | (clock_faults(reports) if clocks else {})
            self.store.set(f"{name}_verdict", json.dumps(faults))
        self._obey(name)

    def _pass_together(self, name: str) -> None:
        """Wait until all are here: what they do next, they do at one time."""
        if self.store.add(f"{name}_here", 1) == self.ranks.world_size:
            self.store.set(f"{name}_go", "")
        with suppress(dist.DistError):  # rank 0 will miss a report, and knows whose
            self.store.wait([f"{name}_go"], timedelta(seconds=self.left + 1))

    def _reports(self, name: str) -> dict[int, dict[str, object]]:
        """What the ranks report before the deadline."""
        keys = [f"{name}_{rank}" for rank in range(self.ranks.world_size)]
        with suppress(dist.DistError):
            self.store.wait(keys, timedelta(seconds=self.left + 5))
        there = [rank for rank, key in enumerate(keys) if self.store.check([key])]
        return {rank: json.loads(self.store.get(keys[rank])) for rank in there}

    def _missing(self, reports: Mapping[int, object]) -> dict[str, str]:
        silent = [rank for rank in range(self.ranks.world_size) if rank not in reports]
        return {node_of(rank, self.ranks): f"rank {rank} does not answer" for rank in reversed(silent)}

    def _obey(self, name: str) -> None:
        """End where rank 0 says so."""
        key = f"{name}_verdict"
        try:
            self.store.wait([key], timedelta(seconds=self.left + VERDICT_SECONDS))
            faults = json.loads(self.store.get(key))
        except dist.DistError as error:
            fault = {self.ranks.master_addr: f"rank 0 does not answer there in check {name}"}
            raise BadNodesError(fault) from error
        if not faults:
            return
        self._let_all_read(name)
        if len(faults) > _node_count(self.ranks) / 2 and _node_count(self.ranks) > 1:
            lines = "; ".join(f"{node}: {fault}" for node, fault in sorted(faults.items()))
            raise TrainingError(f"check {name} failed on most machines, so none is to blame: {lines}")
        raise BadNodesError(faults)

    def _let_all_read(self, name: str) -> None:
        """Keep rank 0's store until the others know: they would blame its machine."""
        with suppress(dist.DistError):
            readers, until = f"{name}_readers", time.monotonic() + READ_SECONDS
            self.store.add(readers, 1)
            while self.ranks.rank == 0 and self.store.add(readers, 0) < self.ranks.world_size:
                if time.monotonic() > until:
                    break
                time.sleep(0.05)


def own_faults(reports: Mapping[int, Mapping[str, object]]) -> dict[str, str]:
    """The faults that ranks found, the first one of each machine."""
    found = [reports[rank] for rank in sorted(reports, reverse=True) if reports[rank]["fault"]]
    return {str(report["node"]): str(report["fault"]) for report in found}


def clock_faults(reports: Mapping[int, Mapping[str, object]]) -> dict[str, str]:
    """The machines whose clock is far from the middle one, of times taken at the same moment."""
    times = {str(report["node"]): float(str(report["time"])) for report in reports.values()}
    middle = statistics.median(times.values())
    wrong = {node: moment - middle for node, moment in times.items() if abs(moment - middle) > CLOCK_SECONDS}
    return {node: f"its clock is {gap:+.0f} s from the others'" for node, gap in wrong.items()}


def node_of(rank: int, ranks: Ranks) -> str:
    """The machine of another rank; ranks are numbered machine by machine."""
    nodes = _nodes()
    index = rank // ranks.local_world_size
    return nodes[index] if index < len(nodes) else f"the machine of rank {rank}"


def _nodes() -> Sequence[str]:
    listed = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    return expand_hosts(listed) if listed else [node_name()]


def _node_count(ranks: Ranks) -> int:
    return max(ranks.world_size // ranks.local_world_size, 1)


def _within(seconds: float, work: Callable[[], str]) -> str:
    """What a piece of work says; one that hangs cannot be ended, so it is left in its thread."""
    said: list[str] = []

    def run() -> None:
        try:
            said.append(work())
        except Exception as error:  # whatever it is, it names a broken machine
            said.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0] if said else "no end before cluster.preflight_timeout"


def _add_up(meeting: Meeting, name: str, rank: int, size: int, device: torch.device) -> str:
    """Sum numbers over a group of ranks and look at the result."""
    kind = "nccl" if device.type == "cuda" else "gloo"
    store = PrefixStore(name, meeting.store)
    limit = timedelta(seconds=meeting.left + 1)
    dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        numbers = torch.full((NUMBERS,), rank + 1.0, device=device)
        dist.all_reduce(numbers)
        right = bool((numbers == size * (size + 1) / 2).all())
    finally:
        dist.destroy_process_group()
    return "" if right else f"{device} adds up wrongly with others"
