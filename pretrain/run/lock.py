"""One process at a time on a run folder, on any file system.

The lock is a file made with O_EXCL, which is atomic on NFS too; locks of the kernel (flock) are not reliable
there. Its owner rewrites its time of change every few seconds. After a kill it stays behind: the process
table tells, where both share it; on another machine, or in another container, a lock that is not touched for
`STALE_SECONDS` has no owner any more. Only changes of the time stamp count, so clocks need not agree.
"""

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pretrain.data.file_lock import last_change, read_owner, this_host
from pretrain.errors import InputError
from pretrain.processes import started

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 45.0  # several heartbeats: a network disk may show a change late


class RunLock:
    """Held while entered; another holder means an `InputError`."""

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.folder, self.path, self.stale_seconds = folder, folder / "run.lock", stale_seconds
        self.owner = {"host": this_host(), "pid": os.getpid(), "started": started(os.getpid())}
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        """Take the lock, over the one of a dead process if need be.

        Raises:
            InputError: another process is at work on the folder, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._remove_if_dead()
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be used as a run folder ({error}); set run.dir"
            ) from error
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back."""
        self._stop.set()
        self._heart.join()
        if read_owner(self.path) == self.owner:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):  # a start that was refused leaves no empty folder
                self.folder.rmdir()

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(self.owner, file)
        return True

    def _remove_if_dead(self) -> None:
        """Remove a lock without an owner, or raise; a rename does it, so that one of two rivals succeeds."""
        holder = read_owner(self.path)
        if self._alive(holder):
            who = _told(holder or read_owner(self.path))
            raise InputError(
                f"{self.folder}: {who} is training in this folder; wait for it, stop it, or set "
                "another run.dir"
            )
        grave = self.path.with_name(f"run.lock.{os.urandom(4).hex()}")
        with suppress(FileNotFoundError):
            self.path.replace(grave)
            if read_owner(grave) != holder:  # a rival was faster, and this is its new lock
                grave.replace(self.path)
            grave.unlink(missing_ok=True)

    def _alive(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == self.owner["host"]:
            return started(holder.get("pid")) == holder.get("started")
        return self._touched_while_watched()

    def _touched_while_watched(self) -> bool:
        """Whether the lock's time stamp changes within the time that a living owner needs to touch it."""
        first, deadline = last_change(self.path), time.monotonic() + self.stale_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.stale_seconds / 10))
            now = last_change(self.path)
            if now != first:
                return now >= 0  # else its owner has just given it back
        return False

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                continue  # a network disk that is away for a while


def _told(holder: dict[str, Any]) -> str:
    """A holder, for people; one that has not written its name yet is none but "another process"."""
    host = str(holder.get("host")).partition(" ")[0]
    return f"process {holder.get('pid')} on {host}" if holder else "another process"
