import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from pretrain.run import profiling
from pretrain.run.profiling import PhaseTimer, StepProfiler

CPU = torch.device("cpu")


def loop(folder: Path, traced: list[int], first: int = 0, last: int = 6) -> None:
    """A loop like that of train.run_loop."""
    timer, x = PhaseTimer(CPU), torch.ones(8, 8)
    with StepProfiler(folder, traced, first) as profiler:
        for step in timer.each("data", range(first, last)):
            with timer.phase("forward"):
                x = x @ x
            with timer.phase("optimizer"):
                x = x / x.max()
            profiler.step(step)


def trace(path: Path) -> list[dict]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def count(events: list[dict], name: str) -> int:
    return sum(event.get("name") == name and event.get("cat") == "user_annotation" for event in events)


@pytest.mark.parametrize(
    ("traced", "first", "name", "steps"),
    [
        ([2, 4], 0, "step_00000002", 2),
        ([0, 1], 0, "step_00000000", 1),  # from the very first step
        ([1, 4], 3, "step_00000003", 1),  # a run continued inside the window
        ([4, 99], 0, "step_00000004", 2),  # the loop ends inside the window
    ],
)
def test_a_trace_holds_the_phases_of_the_chosen_steps(tmp_path, traced, first, name, steps):
    loop(tmp_path / "traces", traced, first)
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name == f"{name}.pt.trace.json.gz"
    events = trace(path)
    assert count(events, "forward") == count(events, "optimizer") == steps
    assert any(event.get("name") == "aten::mm" for event in events)
    assert all("dur" in event for event in events if event.get("ph") == "X")  # what Perfetto draws


@pytest.mark.parametrize("traced", [[], [7, 9]])
def test_no_profiler_starts_without_steps_to_trace(tmp_path, monkeypatch, traced):
    monkeypatch.setattr(profiling, "profile", None)
    loop(tmp_path / "traces", traced)
    assert not (tmp_path / "traces").exists()


def test_an_error_in_the_loop_is_not_hidden_and_leaves_the_trace(tmp_path):
    with pytest.raises(ZeroDivisionError), StepProfiler(tmp_path, [0, 5]) as profiler:
        profiler.step(0)
        raise ZeroDivisionError
    assert len(list(tmp_path.iterdir())) == 1


def test_phases_add_up_and_start_anew(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))  # every reading: one second later
    timer = PhaseTimer(CPU)
    for _ in timer.each("data", range(2)):  # two steps; the reading that finds the end counts as waiting too
        for _ in range(3):
            with timer.phase("forward"):
                pass
    assert timer.means() == {"data": 1.5, "forward": 3.0}
    assert timer.means() == {}
    with timer.phase("forward"):
        pass
    assert timer.means() == {"forward": 1.0}


def test_waiting_for_data_is_what_the_data_cost():
    def slow():
        for item in range(3):
            time.sleep(0.02)
            yield item

    timer = PhaseTimer(CPU)
    start = time.perf_counter()
    assert list(timer.each("data", slow())) == [0, 1, 2]
    assert 0.02 <= timer.means()["data"] <= (time.perf_counter() - start) / 3


def test_the_loader_is_closed_when_the_loop_breaks_off():
    closed = []

    def items():
        try:
            yield from range(9)
        finally:
            closed.append(True)

    turns = PhaseTimer(CPU).each("data", items())
    next(turns)
    turns.close()
    assert closed


@pytest.mark.gpu
def test_on_a_gpu_the_time_is_the_devices(tmp_path):
    device = torch.device("cuda")
    x = torch.randn(8192, 8192, device=device)
    timer = PhaseTimer(device)
    with timer.phase("idle"):
        time.sleep(0.05)
    since = time.perf_counter()
    with timer.phase("work"):
        for _ in range(20):
            x @ x
    queued = time.perf_counter() - since
    means = timer.means()
    assert means["idle"] > 0.04
    assert means["work"] > queued
