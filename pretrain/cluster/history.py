"""What became of each attempt of a job, put together from what its processes and Slurm have left."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pretrain.cluster.job_folder import Job, JobFolder
from pretrain.command_line import STOPPED
from pretrain.ranks import expand_hosts
from pretrain.records import UNSAVED, Record, read_records
from pretrain.run.checkpoint_folder import newest_step
from pretrain.run.durable import write_text

BEGIN = "begin.json"
Outcome = Literal["finished", "stopped", "crashed", "killed", "lost", "bad node", "cancelled"]
# srun: error: node2: task 3: Killed
SRUN = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,-]+): (?P<fate>.+)$", re.M)
Fates = Mapping[int, tuple[str, str]]  # rank -> machine and fate


@dataclass(frozen=True)
class Begin:
    """The start of an attempt."""

    time: float  # seconds since 1970
    step: int  # of the newest checkpoint then
    nodes: list[str]
    log_size: int  # of the batch log then, bytes


@dataclass(frozen=True)
class Attempt:
    """An attempt that has ended: a line of attempts.jsonl. Times in seconds since 1970."""

    number: int
    began: float
    ended: float
    nodes: list[str]
    step_before: int  # of the newest checkpoint at the start
    step: int  # and at the end
    outcome: Outcome
    status: int = 0
    rank: int | None = None  # that failed first
    node: str = ""  # its machine
    line: str = ""  # why, for people
    signature: str = ""  # equal for the same failure
    traceback: str = ""
    bad_nodes: list[str] = field(default_factory=list)
    decision: str = ""  # how the job went on

    @property
    def failed(self) -> bool:
        """Whether it ended by a fault that a restart may cure or not."""
        return self.outcome in ("crashed", "killed", "lost")


def write_begin(folder: JobFolder, job: Job, number: int, nodes: list[str]) -> None:
    """Write down that an attempt starts."""
    size = folder.batch_log.stat().st_size if folder.batch_log.exists() else 0
    begin = Begin(time.time(), newest_step(Path(job.run_dir) / "checkpoints"), nodes, size)
    place = folder.attempt(number)
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / BEGIN, json.dumps(asdict(begin)))


def read_history(folder: JobFolder) -> list[Attempt]:
    """The attempts that have ended and been judged, oldest first; a line that a full disk cut is none."""
    found = []
    for line in folder.history.read_text().splitlines() if folder.history.exists() else []:
        with suppress(ValueError, TypeError):
            found.append(Attempt(**json.loads(line)))
    return found


def append(folder: JobFolder, attempt: Attempt) -> None:
    """Add an attempt to the history."""
    cut = folder.history.exists() and not folder.history.read_bytes().endswith(b"\n")
    with folder.history.open("a") as file:
        file.write(("\n" if cut else "") + json.dumps(asdict(attempt)) + "\n")


def begun(folder: JobFolder) -> list[int]:
    """The numbers of all attempts that were started."""
    return sorted(int(path.parent.name) for path in (folder.path / "attempts").glob(f"*/{BEGIN}"))


def look_back(folder: JobFolder, job: Job, number: int, lost: bool = False) -> Attempt:
    """What became of an attempt.

    Args:
        folder: of the job.
        job: its facts.
        number: of the attempt.
        lost: whether it ended without a verdict: with its first machine, or killed as a whole.
    """
    begin = Begin(**json.loads((folder.attempt(number) / BEGIN).read_text()))
    step = newest_step(Path(job.run_dir) / "checkpoints")
    blank = Attempt(number, begin.time, time.time(), begin.nodes, begin.step, step, "finished")
    records = read_records(folder.attempt(number))
    fates = _fates(folder, begin)
    silent = any(rank not in records or records[rank].status is None for rank in range(job.world_size))
    if lost and silent and not any(record.status and record.is_cause for record in records.values()):
        saved = any(_saved(record) for record in records.values())
        line = "it ended as a whole: its first machine failed, or the job was killed"
        ends = max((record.ended or 0 for record in records.values()), default=0) or time.time()
        blank = replace(blank, ended=ends)
        if saved:
            return replace(blank, outcome="stopped", status=STOPPED, line="saved, can be continued")
        return replace(blank, outcome="lost", status=1, line=line)
    return _judged(blank, job, records, fates)


def _judged(blank: Attempt, job: Job, records: Mapping[int, Record], fates: Fates) -> Attempt:
    """The outcome: that of the first process that failed by itself, else of the killed ones, else of all."""
    causes = [r for r in records.values() if r.status not in (None, 0, STOPPED)]
    causes.sort(key=lambda record: (not record.is_cause, record.ended))
    if causes and causes[0].is_cause:
        return _crashed(blank, causes[0])
    silent = [rank for rank in range(job.world_size) if rank not in records or records[rank].status is None]
    saved = any(_saved(record) for record in records.values())
    if silent and not saved:
        return _killed(blank, job, silent, records, fates)
    if causes:
        return _crashed(blank, causes[0])
    if any(record.status == STOPPED for record in records.values()):
        return replace(blank, outcome="stopped", status=STOPPED, line="saved, can be continued")
    return replace(blank, line=f"finished at step {blank.step}")


def _saved(record: Record) -> bool:
    """Whether the process stopped after a save."""
    return record.status == STOPPED and record.signature != UNSAVED


def _crashed(blank: Attempt, cause: Record) -> Attempt:
    return replace(
        blank,
        outcome="bad node" if cause.bad_nodes else "crashed",
        status=cause.status or 1,
        rank=cause.rank,
        node=cause.node,
        line=cause.line,
        signature=cause.signature or f"status {cause.status}",
        traceback=cause.traceback,
        bad_nodes=cause.bad_nodes,
    )


def _killed(
    blank: Attempt,
    job: Job,
    silent: Sequence[int],
    records: Mapping[int, Record],
    fates: Fates,
) -> Attempt:
    """Processes that ended without a word; srun tells the first one's fate, where it could."""
    rank = next((rank for rank in fates if rank in silent), silent[0])
    node, fate = fates.get(rank, ("", ""))
    node = node or (records[rank].node if rank in records else _node_of(rank, job, blank.nodes))
    if len(silent) == job.world_size and not records:
        line = f"no process has started{f' ({fate})' if fate else ''}; see logs/batch.log"
        return replace(blank, outcome="crashed", status=1, node=node, line=line, signature="not started")
    line = f"ended without a word ({fate or 'killed'}); was its memory full? See logs/batch.log"
    return replace(blank, outcome="killed", status=1, rank=rank, node=node, line=line, signature="killed")


def _node_of(rank: int, job: Job, nodes: Sequence[str]) -> str:
    """The machine of a process that never spoke; they are numbered machine by machine."""
    per_node = max(job.world_size // max(len(nodes), 1), 1)
    return nodes[min(rank // per_node, len(nodes) - 1)] if nodes else ""


def _fates(folder: JobFolder, begin: Begin) -> dict[int, tuple[str, str]]:
    """Machine and fate of the tasks that srun complains of, in its order."""
    if not folder.batch_log.exists():
        return {}
    with folder.batch_log.open("rb") as file:
        file.seek(begin.log_size)
        text = file.read().decode(errors="replace")
    found: dict[int, tuple[str, str]] = {}
    for match in SRUN.finditer(text):
        for rank in expand_hosts(f"[{match['ranks']}]"):
            found.setdefault(int(rank), (match["node"], match["fate"]))
    return found
