"""Ranks that act as one: what fails on one is raised by all, so that none waits for one that gave up."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from pretrain.distributed import is_distributed, rank, world_size

T = TypeVar("T")


class Together:
    """A gloo group of all ranks apart from that of training: a thread may use it while training communicates.

    Without a process group everything runs here and now. All methods are collective, and so is making one.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo") if is_distributed() else None

    def first(self, action: Callable[[], T]) -> T:
        """Rank 0 acts while the others wait: its result, or its error, on every rank."""
        if self.group is None:
            return action()
        outcome = _Outcome(action) if rank() == 0 else None
        box: list[Any] = [outcome]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return (outcome or box[0]).result()

    def every(self, action: Callable[[], T]) -> T:
        """Every rank acts: its own result, or on all of them the error of the lowest rank that failed."""
        if self.group is None:
            return action()
        outcome = _Outcome(action)
        for number, error in enumerate(self._gather(outcome.error)):
            if error is not None:
                raise outcome.error if outcome.error is not None and number == rank() else error
        return outcome.result()

    def same(self, value: Any) -> bool:
        """Whether all ranks have an equal value."""
        return self.group is None or all(other == value for other in self._gather(value))

    def close(self) -> None:
        """Give the group back; nothing of this object works any more."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def _gather(self, value: Any) -> list[Any]:
        values = [None] * world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values


class _Outcome(Generic[T]):
    """What an action came to; one that is sent to another rank loses the cause of its error."""

    def __init__(self, action: Callable[[], T]) -> None:
        self.error: BaseException | None = None
        try:
            self._value = action()
        except BaseException as error:  # Ctrl-C as well: the other ranks wait
            self.error = error

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self._value
