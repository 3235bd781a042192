"""What each process of a job writes down about itself, for the one that decides how it goes on. No torch.

One file a rank and attempt, written at the start and completed at the end; a process that is killed leaves
it incomplete. Without `begin` nothing is written: nobody reads it of a run started by hand.
"""

import json
import os
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pretrain.command_line import STOPPED, status_of
from pretrain.redaction import without_secrets

UNSAVED = "no save"  # signature of a process that a signal ended before it trained, or while it failed


@dataclass(frozen=True)
class Record:
    """One process of one attempt. Times are in seconds since 1970, by its machine's clock."""

    rank: int
    node: str
    pid: int
    began: float
    ended: float | None = None
    status: int | None = None  # exit status; None while it runs, and for ever when it was killed
    line: str = ""  # why it ended, for people
    is_cause: bool = True  # False: it ended because another one had failed
    signature: str = ""  # kind and place of the error, equal when the same one happens again
    traceback: str = ""
    bad_nodes: list[str] = field(default_factory=list)  # machines that are to blame


_mine: list[tuple[Path, Record]] = []
_trained: list[bool] = []


def node_name() -> str:
    """This machine, as Slurm or its own people call it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def begin(folder: Path, rank: int) -> None:
    """Write down that this process has started.

    Args:
        folder: of the attempt; made when missing.
        rank: of this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank:05}.json"
    _mine[:] = [(path, Record(rank, node_name(), os.getpid(), time.time()))]
    _write(path, _mine[0][1])


def note_training() -> None:
    """Let others in this process know that training looks at signals itself from now on."""
    _trained[:] = [True]


def has_trained() -> bool:
    """Whether training has begun in this process, and may have ended."""
    return bool(_trained)


def end(status: int, line: str = "", is_cause: bool = True) -> None:
    """Write down how this process ends; the first reason counts."""
    _complete(status=status, line=line, is_cause=is_cause)


def end_unsaved() -> None:
    """Write down that a signal ends this process while it has nothing to save."""
    _complete(status=STOPPED, line="told to end", signature=UNSAVED)


def end_with(error: BaseException, is_cause: bool, bad_nodes: list[str]) -> None:
    """Write down the error that ends this process."""
    status, text = status_of(error), without_secrets(" ".join(str(error).split()))
    _complete(
        status=status,
        line=text if status > 1 else f"{type(error).__name__}: {text}",
        is_cause=is_cause,
        signature=signature(error),
        traceback=without_secrets("".join(traceback.format_exception(error))),
        bad_nodes=bad_nodes,
    )


def signature(error: BaseException) -> str:
    """The kind of an error and the lines of code it came through; its text may hold numbers that vary."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"


def read_records(folder: Path) -> dict[int, Record]:
    """The records of an attempt by rank; empty when no process has started."""
    records = {}
    for path in sorted(folder.glob("rank_*.json")):
        with suppress(
            OSError, ValueError, TypeError
        ):  # cut off by a full disk: as one that was never written
            record = Record(**json.loads(path.read_text()))
            records[record.rank] = record
    return records


def _complete(**facts: object) -> None:
    for path, record in _mine:
        if record.status is None:
            ended = replace(record, ended=time.time(), **facts)  # type: ignore[arg-type]
            _mine[:] = [(path, ended)]
            with suppress(OSError):  # a full disk must not hide why the process ends
                _write(path, ended)


def _write(path: Path, record: Record) -> None:
    """In one step: a reader sees no part of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record)))
    temporary.replace(path)
