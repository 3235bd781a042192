"""Waiting for a library that may wait without end. No torch.

It runs in a thread, which is left behind when nothing comes.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import TypeVar

from pretrain.data.retry import one_line
from pretrain.errors import InputError

AHEAD = 2  # items that the thread may be ahead
POLL_SECONDS = 1.0  # until the thread notices that nobody listens any more

T = TypeVar("T")


class _End:
    """Behind the last item."""


def aside(produce: Callable[[], Iterator[T]], seconds: float) -> Generator[T, None, None]:
    """What an iterator yields, made and read in another thread.

    Raises:
        OSError: nothing came for so many seconds, or the iterator raised an error of any kind.
        InputError: the iterator raised it.
    """
    results: queue.Queue[T | Exception | _End] = queue.Queue(AHEAD)
    abandoned = threading.Event()
    threading.Thread(target=_run, args=(produce, results, abandoned), name="transfer", daemon=True).start()
    try:
        while True:
            item = results.get(timeout=seconds)
            if isinstance(item, _End):
                return
            if isinstance(item, Exception):
                raise _failure(item)
            yield item
    except queue.Empty as error:
        raise TimeoutError(f"no byte for {seconds:g} s") from error
    finally:
        abandoned.set()


def _run(
    produce: Callable[[], Iterator[T]],
    results: "queue.Queue[T | Exception | _End]",
    abandoned: threading.Event,
) -> None:
    try:
        for item in produce():
            _put(item, results, abandoned)
            if abandoned.is_set():
                return
        _put(_End(), results, abandoned)
    except Exception as error:  # handed over: whoever listens raises it
        _put(error, results, abandoned)


def _put(
    item: T | Exception | _End, results: "queue.Queue[T | Exception | _End]", abandoned: threading.Event
) -> None:
    while not abandoned.is_set():
        with suppress(queue.Full):
            return results.put(item, timeout=POLL_SECONDS)


def _failure(error: Exception) -> Exception:
    """The clients of stores have errors of their own; here they are all failures of a transfer."""
    if isinstance(error, OSError | InputError):
        return error
    return OSError(f"{type(error).__name__}: {one_line(error)}")
