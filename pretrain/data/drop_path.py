"""Which sequences of a group run through each residual branch: drawn here, the model draws nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.config.derived import kept_rows

Rows = np.ndarray[Any, np.dtype[np.int64]]

PADDING = -1


def drop_subsets(rates: Sequence[float], count: int, rng: np.random.Generator) -> Rows | None:
    """Independent random subsets of `count` sequences for each block and each of its two branches.

    Args:
        rates: drop-path rate of each block.
        count: sequences of one kind in the group.
        rng: all randomness comes from here.

    Returns:
        (depth, 2, kept) rows; axis 1 is attention, feed-forward. A block has `kept_rows(rate, count)` rows,
        and PADDING behind them where another block keeps more. None where nothing is dropped.
    """
    if not any(rates) or not count:
        return None
    kept = [kept_rows(rate, count) for rate in rates]
    rows = np.full((len(rates), 2, max(kept)), PADDING, np.int64)
    for block, size in enumerate(kept):
        for branch in range(2):
            rows[block, branch, :size] = rng.permutation(count)[:size]
    return rows
