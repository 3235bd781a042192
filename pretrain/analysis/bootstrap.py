"""How much a score would move with other test images of the same kind: percentile bootstrap over images."""

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.seeding import torch_stream

DRAWS = 1000
LEVEL = 0.95
CHUNK = 2**22  # rows drawn at a time


def mean_interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of values (m,), one for each image."""
    values = values.double().cpu()
    number, generator = len(values), torch_stream(seed, "bootstrap")
    sizes = torch.arange(DRAWS).split(max(1, CHUNK // number))
    means = [
        values[torch.randint(number, (len(part), number), generator=generator)].mean(dim=1) for part in sizes
    ]
    return _ends(torch.cat(means))


def interval(statistic: Callable[[Tensor], float], number: int, seed: int = 0) -> tuple[float, float]:
    """The interval of a statistic of `number` images.

    Args:
        statistic: of the images at some rows (number,), repeated where drawn again.
        number: m.
        seed: of the draws.
    """
    generator = torch_stream(seed, "bootstrap")
    drawn = [statistic(torch.randint(number, (number,), generator=generator)) for _ in range(DRAWS)]
    return _ends(torch.tensor(drawn, dtype=torch.float64))


def _ends(drawn: Tensor) -> tuple[float, float]:
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = drawn.nanquantile(ends).tolist()
    return low, high
