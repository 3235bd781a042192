"""The benchmark of activation checkpointing at toy size: its modes agree, its figures add up."""

import json
import os
import subprocess
import sys

import pytest

from tests.benchmarks.running import ROOT, benchmark

TOY = "--sizes tiny --precisions fp32 --batch 2 --prototypes 64 --repeats 1 --device cpu"
MODES = {"none", "selective", "full"}


def test_the_modes_agree_and_the_figures_are_there() -> None:
    run = benchmark("checkpointing", *TOY.split())
    assert run.returncode == 0, run.stderr
    case = json.loads(run.stdout.splitlines()[-1])["cases"]["tiny fp32"]
    assert case["largest_relative_difference_of_losses"] < 1e-6
    assert set(case["modes"]) == set(case["parts_median_s"]) == MODES
    seconds = {}
    for mode, row in case["modes"].items():
        parts = case["parts_median_s"][mode]
        assert row["step_s"] == pytest.approx(sum(parts.values()))  # of one turn
        assert row["images_per_s"] == pytest.approx(2 / row["step_s"])
        seconds[mode] = parts["student forward"] + parts["backward"]
    added = {mode: seconds[mode] - seconds["none"] for mode in ("selective", "full")}
    assert case["selective_of_full"] == pytest.approx(added["selective"] / added["full"])


def test_a_side_has_the_checkpointing_of_its_name() -> None:
    code = (
        "from checkpointing import MODES, configuration, parse\n"
        "engines = [configuration(parse(), 'tiny', 'bf16', mode).engine for mode in MODES]\n"
        "print(*(f'{e.activation_checkpointing} {e.precision}' for e in engines))"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["none", "bf16", "selective", "bf16", "full", "bf16"], run.stderr


def test_wrong_input_is_one_line() -> None:
    run = benchmark("checkpointing", "--patch-size", "15")
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
