"""Cycles are collected at the steps that are due and nowhere between them, also in a training run."""

import gc
import weakref
from contextlib import contextmanager

import pytest

from pretrain.run.garbage import StepwiseCollector
from pretrain.train import main
from tests.test_train import config


class Node:
    """Can be referred to weakly."""


@contextmanager
def collections():
    """The generations that are collected meanwhile, in order."""
    found = []

    def note(phase, info):
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


def garbage_of_a_step():
    """More cycles than the automatic collector waits for; a weak reference to one of them."""
    assert gc.get_threshold()[0] < 5_000
    for _ in range(5_000):
        node = Node()
        node.itself = node
    return weakref.ref(node)


def test_cycles_go_at_the_steps_that_are_due_only():
    assert gc.isenabled()
    with collections() as found, StepwiseCollector(every=4) as collector:
        for step in range(3, 10):
            cycle = garbage_of_a_step()
            assert cycle() is not None
            before = len(found)
            collector.step(step)
            due = step in (3, 4, 8)  # the first, and multiples of 4
            assert found[before:] == ([2] if due else [])
            assert (cycle() is None) == due
    assert len(found) == 3 and gc.isenabled() and gc.get_freeze_count() == 0


def test_what_the_first_step_leaves_is_not_looked_at_again():
    with StepwiseCollector(every=1) as collector:
        collector.step(1)
        assert gc.get_freeze_count() > len(gc.get_objects())
        cycle = garbage_of_a_step()
        collector.step(2)
        assert cycle() is None
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_an_error_gives_back_what_was(enabled):
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(KeyError), StepwiseCollector():
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_no_automatic_collection_runs_in_a_training_loop(shards, tmp_path, monkeypatch):
    seen, step = [], StepwiseCollector.step

    def noted(self, number):
        step(self, number)
        seen.append((number, [*found]))

    monkeypatch.setattr(StepwiseCollector, "step", noted)
    with collections() as found:
        assert main(config(shards, tmp_path / "run")) == 0
    assert [number for number, _ in seen] == [*range(1, 13)]
    assert seen[-1][1] == seen[0][1]  # none after the one that the first step ends with
    assert seen[0][1][-1] == 2
