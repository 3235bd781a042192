"""Trying again after a failure of a disk, a network or a server. No torch."""

import errno
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable
from typing import TypeVar

from pretrain.errors import InputError, TrainingError
from pretrain.redaction import without_secrets

FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0  # seconds; doubled from one to the other
JITTER = 0.25  # the longest addition to a delay, as a share of it
FINAL_TYPES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FINAL_ERRNOS = DISK_FULL | {errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}

T = TypeVar("T")


def retry(action: Callable[[], T], place: str, attempts: int, first_delay: float = FIRST_DELAY) -> T:
    """The result of an action, which is called again after an OSError; each failure is a line on stderr.

    A failure that time does not mend (no such file, no permission, disk full) is not tried again, nor is
    anything but an OSError.

    Args:
        action: may be called several times.
        place: what the action works on, for messages, such as the address of a shard.
        attempts: calls at most; at least 1.
        first_delay: seconds before the second call; doubled from then on, up to `LONGEST_DELAY`.

    Raises:
        InputError: the failure is one that stays.
        TrainingError: the last attempt failed too.
    """
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except OSError as error:
            reason = without_secrets(one_line(error))
            if is_final(error):
                raise InputError(f"{place}: {reason}") from error
            if attempt == attempts:
                raise TrainingError(f"{place}: gave up after {_count(attempts)}: {reason}") from error
            delay = _delay(place, attempt, first_delay)
            print(
                f"{place}: {reason}; attempt {attempt + 1} of {attempts} in {delay:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(delay)
    raise ValueError(f"attempts must be at least 1, not {attempts}")


def is_final(error: OSError) -> bool:
    """Whether the same call would fail in the same way for as long as nobody changes anything."""
    return isinstance(error, FINAL_TYPES) or error.errno in FINAL_ERRNOS


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__


def _delay(place: str, attempt: int, first_delay: float) -> float:
    """Seconds to wait; processes that failed together come back one after another."""
    who = f"{place} {attempt} {socket.gethostname()} {os.getpid()}"
    share = zlib.crc32(who.encode("utf-8", "surrogateescape")) / 2**32
    return float(min(first_delay * 2 ** (attempt - 1), LONGEST_DELAY) * (1 + JITTER * share))


def _count(attempts: int) -> str:
    return "1 attempt" if attempts == 1 else f"{attempts} attempts"
