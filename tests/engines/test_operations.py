"""A step asks no more of the device than `operations.json` says; a busy machine changes nothing in that."""

import pytest
import torch

from tests.engines.count_operations import CASES, COMMAND, count, differences, read
from tests.engines.operation_counter import OperationCounter, PhaseCounts


@pytest.mark.parametrize("name", CASES)
def test_a_step_asks_no_more_than_stored(name, capsys):
    worse, less = differences(count(CASES[name]), read().get(name, {}))
    with capsys.disabled():
        for line in less:
            print(f"\n{name}, {line}: if that is meant, store it by {COMMAND}")
    assert not worse, f"{name}:\n" + "\n".join(worse) + f"\nIf that is meant, store it by {COMMAND}"


def counted(work) -> PhaseCounts:
    counter = OperationCounter()
    with counter.counting(), counter.phase("forward"):
        work()
    return counter.phases["forward"]


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "upload": lambda x: x * torch.tensor(2.0),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "mask assignment": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "repeats": lambda x: x.repeat_interleave(torch.ones(8, dtype=torch.int64)),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("work", WAITS.values(), ids=WAITS)
def test_a_wait_is_seen(work):
    x = torch.ones(8)
    assert counted(lambda: work(x)).waits.total() == 1


def test_what_waits_for_nothing_is_none():
    x, rows = torch.ones(8), torch.zeros(8, dtype=torch.int64)
    found = counted(lambda: (x[rows], torch.where(x > 0, 0.0, x), x.repeat_interleave(2), x.to("cpu")))
    assert not found.waits


def test_products_and_operations_are_counted_forward_and_backward():
    x, weight = torch.randn(5, 3), torch.randn(3, 4, requires_grad=True)
    found = counted(lambda: (x @ weight).square().sum().backward())
    assert found.flops == 2 * 2 * 5 * 3 * 4
    assert found.operations["mm"] == 2
    assert not {"detach", "t", "expand"} & set(found.operations)


def test_what_grew_is_named():
    name = next(iter(CASES))
    stored = read()[name]
    phases = count(CASES[name])
    phases["backward"].operations["mul"] += 30
    phases["backward"].flops += 7
    phases["optimizer"].waits["_local_scalar_dense"] += 1
    phases["teacher"].operations["add"] -= 3
    worse, less = differences(phases, stored)
    assert worse[0].endswith("stored (as many products, of other sizes)")
    assert "+30 mul" in worse[1] and worse[1].startswith("backward: ")
    assert worse[2] == "optimizer: the host would wait for a GPU +1 _local_scalar_dense"
    assert len(less) == 1 and "-3 add" in less[0]
