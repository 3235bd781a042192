"""Rows of K values in blocks: element-wise work passes over a block while it is in the cache.

On a CPU a whole matrix of logits travels through memory once for each operation; a block of it stays in the
cache for all of them. A GPU has to be kept busy instead, and a block only bounds the memory of what is in
between. Products get larger blocks than what is done with them: each of them reads all prototypes.
"""

from collections.abc import Iterator, Sequence

import torch

CACHED_BYTES = 2**20  # of fp32 on a CPU: a core's own cache holds a few of these
PRODUCT_BYTES = 2**26  # of fp32 logits made at once


def row_blocks(shape: Sequence[int], size: int) -> Iterator[slice]:
    """Consecutive slices of the rows of (rows, K), each of at most `size` bytes of fp32, or of one row."""
    rows, columns = shape
    step = max(size // (4 * columns), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def cached_bytes(device: torch.device) -> int:
    """The size of a block for element-wise work."""
    return CACHED_BYTES if device.type == "cpu" else PRODUCT_BYTES
