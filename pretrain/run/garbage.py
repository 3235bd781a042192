"""Python's collector of reference cycles, run at chosen steps instead of whenever it wants.

By itself it walks all objects of the process, some 350,000 with PyTorch loaded, once in a few hundred steps:
0.15 to 0.2 s, on each rank at a step of its own, and all wait for every one of them.
"""

import gc
from types import TracebackType
from typing import Self

EVERY = 100  # steps between collections: a step leaves next to nothing, pictures and evaluations more


class StepwiseCollector:
    """Entered around the training loop, which calls `step` at the end of every step."""

    def __init__(self, every: int = EVERY) -> None:
        """Nothing changes before the context is entered.

        Args:
            every: steps between collections.
        """
        self.every = every
        self._automatic, self._frozen = gc.isenabled(), False

    def __enter__(self) -> Self:
        """No collection from now on but at the steps that are due."""
        self._automatic = gc.isenabled()
        gc.disable()
        return self

    def step(self, step: int) -> None:
        """Collect if it is due, at the same steps on every rank.

        What is there after this process's first step stays to the end, so that later collections need not
        look at it.

        Args:
            step: optimizer steps done.
        """
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._frozen = True
        elif step % self.every == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Back to what was."""
        gc.unfreeze()
        if self._automatic:
            gc.enable()
