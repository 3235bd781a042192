"""One process at a time at some work, on any file system and among several machines. No torch.

The lock is a file made with O_EXCL, which is atomic on NFS too; locks of the kernel (flock) are not reliable
there. Its owner rewrites its time of change every few seconds. The lock of an owner that was killed is taken
over: at once where the process table tells, and otherwise when it was not touched for `STALE_SECONDS` while
somebody waited. Only changes of the time stamp count, so clocks need not agree.

An owner that was suspended for longer finds its lock in other hands. So a lock saves double work; that no
file is ever half-written rests on renaming.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.processes import started

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 45.0  # several heartbeats: a network disk may show a change late


class FileLock:
    """A lock that is asked for again and again until it is free; waiting is the caller's."""

    def __init__(self, path: Path, stale_seconds: float = STALE_SECONDS) -> None:
        """The lock at a path; its folder exists."""
        self.path, self.stale_seconds = path, stale_seconds
        self._seen: tuple[int, float] = (-1, 0.0)  # time stamp of another's lock, and when it was first seen
        self._owner: dict[str, Any] = {}  # while held
        self._heart: _Heart | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free or its owner is gone.

        Raises:
            OSError: the folder cannot be written.
        """
        if not self._create():
            holder = read_owner(self.path)
            if not self._is_dead(holder):
                return False
            self._bury(holder)
            if not self._create():
                return False
        self._heart = _Heart(self.path)
        return True

    def release(self) -> None:
        """Give the lock back, unless it is in other hands by now."""
        assert self._heart is not None, "only what was acquired is released"
        self._heart.stop()
        self._heart = None
        if read_owner(self.path) in (self._owner, {}):
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        pid = os.getpid()
        self._owner = {"host": this_host(), "pid": pid, "started": started(pid), "id": os.urandom(8).hex()}
        with os.fdopen(handle, "w") as file:
            json.dump(self._owner, file)
        return True

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == this_host() and started(holder.get("pid")) != holder.get("started"):
            return True
        stamp, now = last_change(self.path), time.monotonic()
        if stamp != self._seen[0]:
            self._seen = (stamp, now)
        return now - self._seen[1] > self.stale_seconds

    def _bury(self, holder: dict[str, Any]) -> None:
        """Remove a dead owner's lock; a rename does it, so that one of several rivals succeeds."""
        grave = self.path.with_name(f"{self.path.name}.{os.urandom(4).hex()}")
        with suppress(FileNotFoundError):
            self.path.replace(grave)
            if read_owner(grave) != holder:  # a rival was faster, and this is its new lock
                with suppress(OSError):
                    os.link(grave, self.path)
            grave.unlink()


class _Heart:
    """Touches a lock while it is held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="file-lock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a network disk that is away for a while
                os.utime(self.path)


def this_host() -> str:
    """This machine and its process table: containers of one machine may have a table each."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def read_owner(path: Path) -> dict[str, Any]:
    """The owner; empty when the file is gone, damaged or not written yet."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def last_change(path: Path) -> int:
    """The file's time of change in nanoseconds; -1 when it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1
