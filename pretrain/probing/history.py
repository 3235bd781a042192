"""The curvature that L-BFGS has seen on its way, for many problems at once."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor


class History:
    """The last steps of P problems with the changes of their gradients, each in a ring of its own."""

    SIZE: ClassVar[int] = 10

    def __init__(self, weights: Tensor) -> None:
        """Begin without any.

        Args:
            weights: (P, K, D), for shape, dtype and device.
        """
        number, *shape = weights.shape
        self.steps = weights.new_zeros(number, self.SIZE, *shape)
        self.changes = torch.zeros_like(self.steps)
        self.inverse = weights.new_zeros(number, self.SIZE)  # 1 / (step . change); 0 where there is none
        self.newest = torch.zeros(number, dtype=torch.int64, device=weights.device)

    def push(self, wanted: Tensor, steps: Tensor, changes: Tensor) -> None:
        """Keep steps and changes (P, K, D) where wanted (P,), and where rounding leaves their curvature."""
        product = dot(steps, changes)
        least = torch.finfo(steps.dtype).eps * (dot(steps, steps) * dot(changes, changes)).sqrt()
        kept = (wanted & (product > least)).nonzero()[:, 0]
        self.newest[kept] = (self.newest[kept] + 1) % self.SIZE
        slots = self.newest[kept]
        self.steps[kept, slots], self.changes[kept, slots] = steps[kept], changes[kept]
        self.inverse[kept, slots] = 1 / product[kept]

    def apply(self, gradient: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
        """The inverse Hessian's estimate times a gradient (P, K, D) (Nocedal and Wright, algorithm 7.4).

        Args:
            gradient: of each problem.
            metric: the estimate before any step, times (P, K, D).
        """
        vector, shares = gradient, []
        for age in range(self.SIZE):  # an empty place of the ring changes nothing
            step, change, inverse = self._seen(age)
            shares.append(inverse * dot(step, vector))
            vector = vector - shares[-1].view(-1, 1, 1) * change
        vector = metric(vector)
        for age in reversed(range(self.SIZE)):
            step, change, inverse = self._seen(age)
            share = shares[age] - inverse * dot(change, vector)
            vector = vector + share.view(-1, 1, 1) * step
        return vector

    def clear(self, index: int) -> None:
        """Forget all of one problem."""
        self.inverse[index] = 0

    def move(self, moves: Sequence[tuple[int, int]], number: int) -> None:
        """Keep the first `number` problems, after moving others (place, from where) among them."""
        self.steps, self.changes = moved(self.steps, moves, number), moved(self.changes, moves, number)
        self.inverse, self.newest = moved(self.inverse, moves, number), moved(self.newest, moves, number)

    def _seen(self, age: int) -> tuple[Tensor, Tensor, Tensor]:
        """Steps, changes (P, K, D) and inverse products (P,), `age` steps before the newest."""
        rows = torch.arange(len(self.newest), device=self.newest.device)
        slots = (self.newest - age) % self.SIZE
        return self.steps[rows, slots], self.changes[rows, slots], self.inverse[rows, slots]


def dot(left: Tensor, right: Tensor) -> Tensor:
    """(P, K, D) and (P, K, D) to their inner products (P,)."""
    return (left * right).sum(dim=(1, 2))


def moved(tensor: Tensor, moves: Sequence[tuple[int, int]], number: int) -> Tensor:
    """What is left of a batch (P, ...): its first `number`, as a view, after copies (to, from) in place."""
    for hole, index in moves:
        tensor[hole] = tensor[index]
    return tensor[:number]
