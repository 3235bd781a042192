"""Mean and variance of tensors that arrive in batches, in fp64, without a second look."""

import torch
from torch import Tensor


class Moments:
    """Welford's algorithm, a batch at a time (Chan, Golub and LeVeque 1979): each value counts the same."""

    def __init__(self) -> None:
        self.number = 0
        self.mean = torch.zeros((), dtype=torch.float64)  # on the device of the values, once there are some
        self._squares = torch.zeros((), dtype=torch.float64)  # of deviations from the mean

    def add(self, values: Tensor) -> None:
        """Take values (b, ...) in; the first dimension is counted."""
        rows = values.detach()
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # which has no fp64
        mean, number = rows.mean(dim=0), self.number + len(rows)
        apart = mean - self.mean
        self._squares = self._squares + (rows - mean).square().sum(dim=0)
        self._squares = self._squares + apart.square() * (self.number * len(rows) / number)
        self.mean = self.mean + apart * (len(rows) / number)
        self.number = number

    @property
    def variance(self) -> Tensor:
        """(...) fp64, over all values: divided by their number."""
        return self._squares / max(1, self.number)
