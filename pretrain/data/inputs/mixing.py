"""The stored order, and reading ahead in threads. Memory does not grow with the number of images."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from pretrain.data.inputs.source import Encoded, Result
from pretrain.seeding import numpy_stream

T = TypeVar("T")
R = TypeVar("R")

THREADS = 8  # the decoders and encoders release the interpreter lock
AHEAD = 32  # results that wait at most: images may have 100 MB each
BLOCK_BYTES = 1 << 28  # of encoded images that are mixed at a time


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """Items in a random order: the block shuffling of a training run cannot undo sorted classes."""
    return [items[i] for i in numpy_stream(seed, "pack").permutation(len(items))]


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in the order of the items, a few of which are worked on ahead."""
    remaining = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(remaining, AHEAD))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(remaining, 1))


def mix(results: Iterable[Result], seed: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Result]:
    """Results in a random order within blocks: for files whose parts are only cheap to read in turn."""
    random, block, size = numpy_stream(seed, "pack", "blocks"), list[Result](), 0
    for result in results:
        block.append(result)
        size += len(result.image) if isinstance(result, Encoded) else 0
        if size >= block_bytes:
            yield from _permuted(block, random)
            block, size = [], 0
    yield from _permuted(block, random)


def _permuted(block: Sequence[Result], random: np.random.Generator) -> Iterator[Result]:
    return (block[i] for i in random.permutation(len(block)))
