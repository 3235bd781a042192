"""Local copies of remote shards, shared by the processes of a machine and bounded in size. No torch.

A copy appears under its name when it is complete and checked. One process downloads a shard while the others
wait. A shard that is open may be evicted: its descriptor stays good, and whoever finds a path gone fetches it
again. Addresses are taken to be immutable: a copy is never compared with its origin again.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

from pretrain.config.schema import DataConfig
from pretrain.data.download import Downloader, indexed_bytes
from pretrain.data.file_lock import FileLock
from pretrain.data.index import index_path
from pretrain.data.indexing import build_index
from pretrain.data.remote import cache_name, scheme, shown
from pretrain.data.retry import FIRST_DELAY, one_line, retry
from pretrain.data.room import LONGEST_POLL_SECONDS, POLL_SECONDS, Room, lock_path, touch
from pretrain.data.transfer import tells_missing
from pretrain.errors import InputError

GB = 10**9
INDEX_THREADS = 16

T = TypeVar("T")


class ShardCache:
    """The copies in one folder; cheap to pickle."""

    def __init__(
        self, folder: Path, max_bytes: int, attempts: int, seconds: float, first_delay: float = FIRST_DELAY
    ) -> None:
        """Make the folder where it is missing.

        Args:
            folder: of the copies; processes that share it wait for one another.
            max_bytes: of the shards in it, indexes apart.
            attempts: for each download.
            seconds: without a byte, after which an attempt has failed.
            first_delay: seconds between the first two attempts.

        Raises:
            InputError: the folder cannot be made.
        """
        self.folder, self.max_bytes = folder, max_bytes
        self.attempts, self.first_delay = attempts, first_delay
        self._downloader = Downloader(Room(folder, max_bytes), seconds)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"data.cache.dir: {folder}: {one_line(error)}; name a folder that can be written"
            ) from error

    @classmethod
    def from_config(cls, data: DataConfig) -> Self:
        """The cache that a configuration describes.

        Raises:
            InputError: its folder cannot be made.
        """
        try:
            folder = Path(data.cache.dir).expanduser().absolute()
        except RuntimeError as error:  # a container's user may have no home
            raise InputError(
                f"data.cache.dir: {data.cache.dir}: {one_line(error).rstrip('.')}; name a folder without ~"
            ) from error
        return cls(folder, int(data.cache.max_gb * GB), data.io_attempts, data.io_timeout)

    def fetch(self, url: str) -> Path:
        """The copy of a remote shard, downloaded if need be; it may be evicted at any later time.

        Raises:
            InputError: there is no such shard, it is damaged or larger than the cache, or cannot be read.
            TrainingError: the download failed again and again, or the disk is full.
        """
        path = self.folder / cache_name(url)
        self._provide(
            path, lambda: _is_there(path), lambda: self._retry(lambda: self._downloader.shard(url, path), url)
        )
        return path

    def index_of(self, url: str) -> Path:
        """The index of a remote shard: the one beside it at the origin, or built from the shard.

        Raises:
            InputError: as `fetch`.
            TrainingError: as `fetch`.
        """
        index = index_path(self.folder / cache_name(url))
        self._provide(index, lambda: indexed_bytes(index) is not None, lambda: self._get_index(url, index))
        return index

    def indexes_of(self, urls: Sequence[str]) -> list[Path]:
        """The indexes of many shards, several at a time.

        Raises:
            InputError: as `fetch`.
            TrainingError: as `fetch`.
        """
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            found = [pool.submit(self.index_of, url) for url in urls]
            try:
                return [index.result() for index in found]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _provide(self, file: Path, is_there: Callable[[], bool], make: Callable[[], None]) -> None:
        """Make a file unless it is there, or another process makes it meanwhile."""
        lock, pause = FileLock(lock_path(file)), POLL_SECONDS
        while not is_there():
            if retry(lock.acquire, f"data.cache.dir: {self.folder}", self.attempts, self.first_delay):
                try:
                    if not is_there():
                        make()
                    return
                finally:
                    lock.release()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)

    def _retry(self, action: Callable[[], T], url: str) -> T:
        return retry(action, shown(url), self.attempts, self.first_delay)

    def _get_index(self, url: str, index: Path) -> None:
        if not self._download_index(url, index):
            self._build_index(url, index)

    def _download_index(self, url: str, index: Path) -> bool:
        """Whether there is a usable index beside the shard; it is in the cache then."""
        if scheme(url) == "pipe":
            return False
        address = _index_url(url)
        if tells_missing(url):
            return self._retry(lambda: self._downloader.index(address, index), address)
        with suppress(OSError):  # most often because it does not exist
            return self._downloader.index(address, index)
        return False

    def _build_index(self, url: str, index: Path) -> None:
        while True:
            shard = self.fetch(url)
            try:
                build_index(shard, index)
                return
            except FileNotFoundError:
                continue  # evicted in between
            except InputError as error:
                raise InputError(f"{shown(url)}: {error}") from error


def _is_there(path: Path) -> bool:
    """Whether there is a copy, as long as its index says; a crash of the machine may have cut it."""
    size = touch(path)
    if size is None:
        return False
    if size == (indexed_bytes(index_path(path)) or size):
        return True
    path.unlink(missing_ok=True)
    return False


def _index_url(url: str) -> str:
    """Where the index of a remote shard lies."""
    address, mark, query = url.partition("?")
    return f"{address}.idx{mark}{query}"
