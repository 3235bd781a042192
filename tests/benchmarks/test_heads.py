"""The benchmark of heads at toy size: the plain head is ours, and the figures are there."""

import json

import pytest

from tests.benchmarks.running import benchmark


def test_the_plain_head_is_ours_and_the_figures_are_there() -> None:
    run = benchmark("heads", "--outputs", "300", "--rows", "8", "--repeats", "2")
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert [size["calls_per_step"] for size in figures["sizes"]] == [1, 4]
    for size in figures["sizes"]:
        assert size["largest_relative_difference_of_plain"] < 1e-5
        seconds = {side: times["median"] for side, times in size["cpu_s_per_step"].items()}
        assert set(seconds) == {"mlp", "ours", "ours, signs", "plain"}
        assert size["plain_over_ours"]["of_medians"] == pytest.approx(seconds["plain"] / seconds["ours"])
    one, four = (size["cpu_s_per_step"]["plain"]["median"] for size in figures["sizes"])
    assert four > 1.5 * one  # it draws at every call


def test_wrong_input_is_refused() -> None:
    run = benchmark("heads", "--rows", "0")
    assert run.returncode == 2 and "must be a whole number from 1 up" in run.stderr
