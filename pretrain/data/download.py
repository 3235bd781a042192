"""One attempt to bring a remote shard or index into the cache, checked before it gets its name. No torch."""

import os
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from pretrain.data.index import index_path, read_header
from pretrain.data.remote import shown
from pretrain.data.retry import DISK_FULL, one_line
from pretrain.data.room import Room, work_path
from pretrain.data.tar import scan
from pretrain.data.transfer import read_remote, remote_size
from pretrain.errors import InputError, TrainingError

LOOK_EVERY = 64 << 20  # bytes of a download of unknown size between two looks at the limit


class Downloader:
    """Brings remote files into the folder of a room. Whoever calls holds the lock of the file."""

    def __init__(self, room: Room, seconds: float) -> None:
        """`seconds` without a byte end an attempt."""
        self.room, self.seconds = room, seconds

    def shard(self, url: str, path: Path) -> None:
        """Download a whole shard; when the disk is full, once more after removing others.

        Raises:
            OSError: the transfer failed, or bytes are missing; another attempt may do better.
            InputError: the shard is damaged, larger than the cache, or another than its index says.
            TrainingError: the disk is full.
        """
        size = self._expected_size(url, path)
        if size is not None:
            self._refuse_too_large(url, size)
        try:
            self._transfer(url, path, size)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self.room.evict_half()
            self._transfer_or_give_up(url, path, size)

    def index(self, url: str, path: Path) -> bool:
        """Download an index; whether there is one that can be used.

        Raises:
            OSError: the transfer failed.
            InputError: the address cannot be read here.
        """
        part = work_path(path)
        part.touch()
        try:
            with closing(receive(url, part, self.seconds)) as counts:
                for _ in counts:
                    pass
            if indexed_bytes(part) is None:
                print(f"{shown(url)}: is not an index of this version; not used", file=sys.stderr, flush=True)
                return False
            part.replace(path)
            return True
        except (FileNotFoundError, PermissionError):  # some stores answer "no access" for what does not exist
            return False
        finally:
            part.unlink(missing_ok=True)

    def _expected_size(self, url: str, path: Path) -> int | None:
        """Bytes of the shard as its server and its index say."""
        told, indexed = remote_size(url, self.seconds), indexed_bytes(index_path(path))
        if told is not None and indexed is not None and told != indexed:
            raise InputError(
                f"{shown(url)}: has {told:,} bytes, but its index is of a file of {indexed:,}; write the "
                f"index at the origin anew (tools/pack.py --index) and remove {index_path(path)}"
            )
        return indexed if told is None else told

    def _refuse_too_large(self, url: str, size: int) -> None:
        if size > self.room.max_bytes:
            raise InputError(
                f"data.cache.max_gb: {shown(url)} has {size:,} bytes or more, and the cache may hold "
                f"{self.room.max_bytes:,}; raise it"
            )

    def _transfer_or_give_up(self, url: str, path: Path, size: int | None) -> None:
        try:
            self._transfer(url, path, size)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise TrainingError(
                f"{self.room.folder}: no room for {shown(url)}"
                f"{'' if size is None else f' of {size:,} bytes'} ({one_line(error)}); "
                f"free some, lower data.cache.max_gb or set data.cache.dir"
            ) from error

    def _transfer(self, url: str, path: Path, size: int | None) -> None:
        """Download under a temporary name, check, rename."""
        part = self.room.reserve(path, size or 0)
        try:
            _check(url, part, self._receive(url, part, size), size)
            os.utime(part, ns=(time.time_ns(), 0))  # never newer than its index, whichever came first
            part.replace(path)
        except FileNotFoundError as error:
            if str(error.filename) != str(part):
                raise
            raise OSError("another process took the download over") from error
        finally:
            part.unlink(missing_ok=True)

    def _receive(self, url: str, part: Path, size: int | None) -> int:
        """The bytes received; where their number was not known before, the limit is held on the way."""
        count = looked = 0
        with closing(receive(url, part, self.seconds)) as counts:
            for count in counts:
                if size is None and count - looked > LOOK_EVERY:
                    looked = count
                    self._make_room(url, count)
        if size is None:
            self._make_room(url, count)
        return count

    def _make_room(self, url: str, count: int) -> None:
        self._refuse_too_large(url, count)
        self.room.evict()


def receive(url: str, target: Path, seconds: float) -> Generator[int, None, None]:
    """Write a remote file over an existing local one; the bytes written so far, after each piece.

    What lies beyond the last byte written stays.

    Raises:
        InputError: the address cannot be read here.
        OSError: the transfer or the writing failed.
    """
    count = 0
    with target.open("r+b") as file, closing(read_remote(url, seconds)) as pieces:
        for piece in pieces:
            file.write(piece)
            count += len(piece)
            yield count


def indexed_bytes(index: Path) -> int | None:
    """Bytes of the tar that an index was built for; None where it is missing, cut or of another version."""
    header = read_header(index)
    return None if header is None else header.tar_size


def _check(url: str, part: Path, count: int, size: int | None) -> None:
    """Refuse a received shard that is not whole: `count` bytes, where `size` were promised (None: unknown).

    Raises:
        OSError: bytes are missing, so another attempt may do better.
        InputError: it is all there, but not a whole tar file.
    """
    if size is not None and count != size:
        raise OSError(f"got {count:,} bytes of {size:,}")
    try:
        for _ in scan(part):
            pass
    except ValueError as error:
        fault = str(error).removeprefix(f"{part}: ")
        if size is None:
            raise OSError(f"got {count:,} bytes that are not a whole shard: {fault}") from error
        raise InputError(f"{shown(url)}: all {count:,} bytes came, but {fault}") from error
