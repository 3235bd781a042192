"""The beginning and the end of a process among ranks: device, process groups, and how a failure ends all.

A rank that fails tells the others (`faults.py`) before it lets go of its connections; each ends with the same
exit status. `destroy_process_group` waits for NCCL's pending work, which never ends once a rank is gone, so
after an error the groups are aborted where they run on GPUs.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed has them too, untyped

from pretrain import distributed
from pretrain.config.schema import EngineConfig
from pretrain.errors import InputError, LostPeerError, TrainingError
from pretrain.faults import Fault, FaultLine, PeerError, fault_of
from pretrain.ranks import SINGLE, Ranks, detect

START_SECONDS = 600.0  # for all ranks to be there; never longer than engine.timeout
NOTE_SECONDS = 3.0  # in which the note of a rank that broke a connection is there
LAST_SECONDS = 60.0  # NCCL's own time-out kills the process without a word, so it comes last
PEER_LOST = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)

_lines: list[FaultLine] = []  # of the session that runs


@contextmanager
def session(cfg: EngineConfig) -> Iterator[torch.device]:
    """Be one of the ranks that the environment tells of; yields this rank's device.

    Raises:
        InputError: the environment contradicts itself, the device is not there, or the ranks cannot meet.
        TrainingError: a rank is missing; a `LostPeerError`: one went away.
        SystemExit: another rank failed; rank 0 has said why.
    """
    ranks = detect(os.environ)
    device = pick_device(cfg.device, ranks)
    if ranks.world_size == 1:
        yield device
        return
    store = _meet(ranks, min(START_SECONDS, cfg.timeout))
    line = FaultLine(store, ranks.rank, ranks.world_size)
    _lines.append(line)
    failed = True
    try:
        _start_groups(store, ranks, device, cfg.timeout)
        yield device
        distributed.barrier()  # no rank goes while another one needs it
        failed = False
    except BaseException as error:
        fault = _published(error, line, cfg.timeout)
        if fault.rank == ranks.rank:
            if isinstance(error, RuntimeError) and fault.status == 3 and not isinstance(error, TrainingError):
                raise LostPeerError(fault.line) from error
            raise
        line.tell(fault)
        raise SystemExit(fault.status) from error
    finally:
        _lines.clear()
        _end_groups(device, failed)
        line.leave()


def give_up(reason: str) -> None:
    """End all ranks, this process at once: its main thread hangs. Does nothing outside of a session."""
    for line in _lines:
        line.end(line.publish(fault_of(TrainingError(reason), line.rank)))


def pick_device(requested: Literal["auto", "cpu", "cuda"], ranks: Ranks = SINGLE) -> torch.device:
    """The device of `engine.device` for this rank, made the current one; auto takes a GPU when there is one.

    Raises:
        InputError: a GPU is asked for and there is none, or none for this rank.
    """
    has_gpu = torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        raise InputError("engine.device=cuda: this process sees no GPU; use engine.device=cpu or auto")
    if not has_gpu or requested == "cpu":
        return torch.device("cpu")
    if ranks.world_size == 1:
        return torch.device("cuda")
    count, index = torch.cuda.device_count(), ranks.local_rank
    if ranks.source == "slurm" and count == 1:
        index = 0  # Slurm shows each task its own GPU
    if index >= count:
        raise InputError(
            f"LOCAL_RANK={index} ({ranks.source}), but this process sees {count} GPU(s); start at most one "
            "process per GPU, or set engine.device=cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _meet(ranks: Ranks, seconds: float) -> Store:
    """Connect to rank 0 and wait for all ranks."""
    place = f"MASTER_ADDR={ranks.master_addr} MASTER_PORT={ranks.master_port}"
    serves = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=seconds)
    try:
        address = (ranks.master_addr, ranks.master_port)
        tcp = TCPStore(*address, is_master=serves, timeout=limit, wait_for_workers=False)
    except (dist.DistError, RuntimeError, ValueError) as error:
        fault = "cannot be opened, take another port" if serves else f"cannot be reached in {seconds:g} s"
        first = str(error).partition("\n")[0]
        raise InputError(f"{place}: rank 0's store {fault} ({first})") from error
    store = PrefixStore(f"pretrain_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    if store.add(f"here_{ranks.rank}", 1) > 1:
        raise InputError(f"{place}: two processes call themselves rank {ranks.rank}; see RANK and the port")
    here = [f"here_{rank}" for rank in range(ranks.world_size)]
    try:
        store.wait(here, limit)
    except dist.DistError as error:
        missing = ", ".join(str(rank) for rank, key in enumerate(here) if not store.check([key]))
        raise TrainingError(
            f"{place}: of {ranks.world_size} ranks, these did not start within {seconds:g} s: {missing}"
        ) from error
    return store


def _start_groups(store: Store, ranks: Ranks, device: torch.device, timeout: float) -> None:
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore("groups", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout + (LAST_SECONDS if on_gpu else 0)),
        device_id=device if on_gpu else None,
    )
    hosts = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    assert hosts is not None, "all ranks belong to it"
    distributed.HOSTS[:] = [hosts]


def _end_groups(device: torch.device, failed: bool) -> None:
    distributed.HOSTS.clear()
    with suppress(Exception):  # what fails here has nothing to add to what failed before
        if failed and device.type == "cuda":
            dist.distributed_c10d._abort_process_group()
        elif distributed.is_distributed():
            dist.destroy_process_group()


def _published(error: BaseException, line: FaultLine, timeout: float) -> Fault:
    """The fault that ends all ranks: what another one has said, or else this rank's own."""
    own = fault_of(error, line.rank)
    if isinstance(error, RuntimeError) and not isinstance(error, TrainingError):
        known = line.wait(NOTE_SECONDS)  # most often the consequence of what happened elsewhere
        own = known or Fault(own.rank, *_explained(error, own, timeout))
    return line.publish(own)


def _explained(error: RuntimeError, fault: Fault, timeout: float) -> tuple[int, str]:
    """Exit status and line of an error in a collective; others keep theirs."""
    if isinstance(error, PeerError) or PEER_LOST.search(str(error)):
        return (
            3,
            "another rank ended without a word; was it killed (memory)? See its output",
        )
    if TIMED_OUT.search(str(error)):
        reason = f"no answer from another rank for engine.timeout={timeout:g} s"
        return 3, f"{reason}; what each rank was doing stands in the folder stacks of the run"
    return fault.status, fault.line
