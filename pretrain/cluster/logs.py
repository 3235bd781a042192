"""Reading the logs of a job, also while they are written and across its restarts."""

import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.cluster.job_folder import JobFolder

POLL_SECONDS = 0.5
RANK_LOG = re.compile(r"r(\d+)_rank(\d+)\.log")


def rank_logs(folder: JobFolder, rank: int) -> list[Path]:
    """The logs of one rank, one an attempt, in order."""
    found = [(match, path) for path in folder.logs.glob("r*_rank*.log") if (match := _match(path))]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0][1])) if int(match[2]) == rank]


def lines(path: Path, count: int) -> list[str]:
    """The last lines of a file."""
    if not path.exists():
        return []
    return path.read_text(errors="replace").splitlines()[-count:] if count else []


def follow(
    newest: Callable[[], Path | None], ended: Callable[[], bool], tail: int = 20, ask_seconds: float = 5.0
) -> Iterator[str]:
    """What is written to a growing file, and then to the one that takes its place.

    Args:
        newest: the file to read now; None while there is none.
        ended: whether nothing more will be written.
        tail: lines of the first file that are shown to begin with.
        ask_seconds: between two questions whether it has ended: Slurm is to have its peace.

    Yields:
        Pieces of text.
    """
    path, place, first, asked, over = None, 0, True, -math.inf, False
    while True:
        if time.monotonic() - asked >= ask_seconds:
            over, asked = ended(), time.monotonic()  # before the last look
        current = newest()
        if current != path and current is not None:
            if path is not None:
                yield _from(path, place)[0]
            path, place = current, _start(current, tail) if first else 0
            first = False
            yield f"==> {path.name} <==\n"
        if path is not None:
            text, place = _from(path, place)
            if text:
                yield text
        if over:
            return
        time.sleep(POLL_SECONDS)


def _from(path: Path, place: int) -> tuple[str, int]:
    """The text of a file from a byte on, and the byte behind it."""
    with path.open("rb") as file:
        file.seek(place)
        content = file.read()
    return content.decode(errors="replace"), place + len(content)


def _start(path: Path, tail: int) -> int:
    """The byte at which the last lines begin."""
    content = path.read_bytes()
    return len(content) - sum(map(len, content.splitlines(keepends=True)[-tail:])) if tail else len(content)


def _match(path: Path) -> re.Match[str] | None:
    return RANK_LOG.fullmatch(path.name)
