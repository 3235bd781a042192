"""Counts what a training step asks of the device: operations, matrix products, waits of the host.

Nothing is timed, so the load of a machine changes nothing. Counted on a CPU: which operations make the host
wait for a GPU is read off their names. Not seen are what a kernel calls by itself, and `Tensor.to` of
another device.

To depend little on the version of torch: names without their overload, no views and no bare allocations,
which formulas of autograd take more or fewer of; products by their sizes, whichever kernel computes them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

BETWEEN = "begin"  # what no phase of the loop holds: schedules, draws of randomized heads

# Values leave the device for the host, or decide the shape of a result there.
WAITS = frozenset(
    {
        *("item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount"),
        *("linalg_svd", "_linalg_svd", "linalg_eigh", "_linalg_eigh", "linalg_lstsq"),
    }
)
MASKED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
# On a CPU no operation, on a GPU a copy for which the host waits.
COPIES = {
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
    Tensor.__array__: "numpy",
    Tensor.cpu: "cpu",
    torch.tensor: "torch.tensor",
    torch.as_tensor: "torch.as_tensor",
}
FREE = frozenset(  # memory without work
    {
        *("detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    }
)


@dataclass
class PhaseCounts:
    """Of one phase of the step, by name without overload."""

    flops: int = 0  # of matrix products and convolutions, a multiply-add as two
    waits: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)  # that start work on a device: no views


class OperationCounter:
    """In place of the loop's timer: a context around a step, whose phases it tells apart."""

    def __init__(self) -> None:
        self.phases: dict[str, PhaseCounts] = defaultdict(PhaseCounts)
        self._name = BETWEEN
        self._products = FlopCounterMode(display=False)
        self._seen = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs inside."""
        with self._products, _Calls(self), _Operations(self):
            yield
            self._enter(BETWEEN)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As `PhaseTimer.phase`."""
        self._enter(name)
        yield
        self._enter(BETWEEN)

    def _enter(self, name: str) -> None:
        """Close the current phase: its products are those since the last one."""
        flops = self._products.get_total_flops()
        self.phases[self._name].flops += flops - self._seen
        self._name, self._seen = name, flops

    def operation(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in one dispatched operation."""
        name, counts = function.overloadpacket.__name__, self.phases[self._name]
        if _waits(name, args, kwargs):
            counts.waits[name] += 1
        if function.namespace == "aten" and not function.is_view and name not in FREE:
            counts.operations[name] += 1

    def copy(self, name: str) -> None:
        """Take in one call that would copy between host and device."""
        self.phases[self._name].waits[name] += 1


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host would wait for a GPU."""
    if name in MASKED:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITS


class _Operations(TorchDispatchMode):
    """Below autograd, so with the backward's operations; what a kernel calls by itself is not seen."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counter.operation(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Calls from Python."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIES:
            self.counter.copy(COPIES[func])
        return func(*args, **(kwargs or {}))
