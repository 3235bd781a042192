"""Sees what a case may not do: change a file elsewhere, start a program, connect, take ages."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OWN = ("__pycache__", "/dev/null")  # Python's and the libraries', whatever the case holds


class TooLong(BaseException):
    """No Exception: nothing may take it for a fault of the input."""


class Guard:
    """One for a process: audit hooks cannot be removed."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # of the case that runs
        self.breaches: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def watch(self, folder: Path, seconds: int) -> Iterator[list[str]]:
        """What happens outside of the folder in the block, a line each.

        Raises:
            TooLong: the block takes more than `seconds`.
        """
        self.folder, self.breaches = folder, []
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(seconds)
        try:
            yield self.breaches
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            self.folder = None

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.breaches.append(f"{event}{arguments}")
        elif event in CHANGES or (event == "open" and int(arguments[2] or 0) & WRITING):
            self.breaches += [f"{event} {p}" for p in arguments[:1] if not self._allowed(p)]

    def _allowed(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor that is open already
        whole = os.path.realpath(os.fsdecode(path))
        return whole.startswith(f"{self.folder}/") or any(part in whole for part in OWN)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"too long, in {frame.f_code.co_qualname if frame else '?'}")
