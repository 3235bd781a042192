"""How long work tells how far it is: a stage has a name and a number of bytes, and is told of those done."""

from collections.abc import Callable

from pretrain.surgery.layouts import State

Advance = Callable[[int], None]  # told of bytes that are done
Stage = Callable[[str, int], Advance]  # begins a stage: what is done, bytes in all


def silent(_what: str, _total: int) -> Advance:
    """A stage that nobody watches."""
    return ignore


def ignore(_done: int) -> None:
    """Watches nothing."""


def size(state: State) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())
