"""The folder of the shard cache as a whole: what lies in it, and room for one more shard. No torch.

Names in it, where NAME is a base name, a dot and 16 digits of a hash:

    NAME.tar          a shard; its time of access is when it was last asked for, its time of change is 0
    NAME.tar.idx      its index; kept when the shard is evicted, and not counted
    .*.part, .*.tmp   a shard or an index that is being written; a part has the size that it will have
    .*.lock           held by the process that writes it

Nothing else in the folder is counted or removed.
"""

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from pretrain.data.file_lock import FileLock

SHARD = re.compile(r".+\.[0-9a-f]{16}\.tar")
UNFINISHED = re.compile(r"\.(.+\.[0-9a-f]{16}\.tar(?:\.idx)?)\.(?:.+\.)?(?:part|tmp)")
LOCK = re.compile(r"\.(.+\.[0-9a-f]{16}\.tar(?:\.idx)?)\.lock")
GRAVE = re.compile(r"\..+\.lock\.[0-9a-f]{8}")  # of a dead owner, while it is being removed
ROOM_LOCK = ".room.lock"
GRACE_NS = 500_000_000  # a shard that was asked for so recently is not evicted: it is about to be opened
TOUCH_NS = GRACE_NS // 2  # between two rewritings of the time of access
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.02, 0.5


class _Shard(NamedTuple):
    used: int  # nanoseconds since 1970
    size: int  # bytes
    path: Path


class Room:
    """Keeps the shards of a folder, and those on their way into it, within a number of bytes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._watched: dict[str, FileLock] = {}  # locks that others held at the last look

    def reserve(self, shard: Path, size: int) -> Path:
        """An empty file for a download, which counts `size` bytes from now on; waits until there is room.

        Whoever asks holds the lock of the shard, and removes or renames the file before giving it back.

        Raises:
            OSError: the folder cannot be written, or the disk has no room for the file.
        """
        pause = POLL_SECONDS
        while not (part := self._try_to_reserve(shard, size)):
            time.sleep(pause)  # other downloads take the room; they end, or their processes do
            pause = min(2 * pause, LONGEST_POLL_SECONDS)
        return part

    def evict(self, size: int = 0) -> bool:
        """Remove what was not used for longest until `size` more bytes fit; whether they do."""
        shards = self._shards()
        total = size + sum(shard.size for shard in shards) + sum(map(_size, self._unfinished()))
        for shard in sorted(shards):
            if total <= self.max_bytes:
                break
            if not 0 <= time.time_ns() - shard.used < GRACE_NS:
                shard.path.unlink(missing_ok=True)
                total -= shard.size
        return total <= self.max_bytes

    def evict_half(self) -> None:
        """Remove half of the bytes, whatever the limit is: others write to the same disk."""
        shards = self._shards()
        surplus = sum(shard.size for shard in shards) / 2
        for shard in sorted(shards):
            if surplus <= 0:
                break
            shard.path.unlink(missing_ok=True)
            surplus -= shard.size

    def _try_to_reserve(self, shard: Path, size: int) -> Path | None:
        lock = FileLock(self.folder / ROOM_LOCK)
        while not lock.acquire():
            time.sleep(POLL_SECONDS)
        try:
            self._sweep()
            if not self.evict(size):
                return None
            part = work_path(shard)
            part.touch(exist_ok=False)
            try:
                os.truncate(part, size)
            except OSError:
                part.unlink()
                raise
            return part
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Remove what dead processes left: their locks, and unfinished files that nobody writes."""
        names = os.listdir(self.folder)  # noqa: PTH208  (names only)
        for name in names:
            if LOCK.fullmatch(name):
                self._sweep_lock(name)
            elif GRAVE.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)
        for name in names:
            match = UNFINISHED.fullmatch(name)
            if match and not lock_path(self.folder / match[1]).exists():  # a writer gives it back at the end
                (self.folder / name).unlink(missing_ok=True)

    def _sweep_lock(self, name: str) -> None:
        lock = self._watched.setdefault(name, FileLock(self.folder / name))
        if lock.acquire():
            lock.release()
            del self._watched[name]

    def _shards(self) -> list[_Shard]:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if SHARD.fullmatch(entry.name) and not entry.name.startswith("."):
                    path = Path(entry.path)
                    if status := _status(path):
                        found.append(_Shard(status.st_atime_ns, status.st_size, path))
        return found

    def _unfinished(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if UNFINISHED.fullmatch(path.name)]


def lock_path(file: Path) -> Path:
    """The lock of whoever writes a file of the cache."""
    return file.with_name(f".{file.name}.lock")


def work_path(file: Path) -> Path:
    """A new name under which a file of the cache is written."""
    return file.with_name(f".{file.name}.{os.urandom(4).hex()}.part")


def touch(shard: Path) -> int | None:
    """Note that a shard is in use; its bytes, or None where it is not there."""
    status = _status(shard)
    if status is None:
        return None
    now = time.time_ns()
    if abs(now - status.st_atime_ns) > TOUCH_NS:
        try:
            os.utime(shard, ns=(now, status.st_mtime_ns))
        except FileNotFoundError:
            return None
        except OSError:  # a folder that may only be read; then nothing is evicted either
            pass
    return status.st_size


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _size(path: Path) -> int:
    status = _status(path)
    return status.st_size if status else 0
