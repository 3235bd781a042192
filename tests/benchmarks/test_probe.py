"""The benchmark of the probes at toy size: both solvers say the same, and its figures are there."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.analysis.inputs import small_model, write_model

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/probe.py", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_both_solvers_fit_every_place_alike(shards: Path, tmp_path: Path) -> None:
    model = small_model()
    weights = write_model(tmp_path / "vit.safetensors", model)
    sets = ("--train", shards / "test-*.tar", "--test", shards / "train-*.tar")
    run = benchmark(weights, *sets, "--C", 0.1, 1, "--work", tmp_path / "work")
    assert run.returncode == 0, run.stderr
    *lines, last = run.stdout.splitlines()
    figures = json.loads(last)
    assert len(lines) == 2 and figures["probes"] == 20  # ten places a block
    assert figures["converged"] == {"torch": 20, "sklearn": 20}
    assert figures["largest_test_difference_points"] < 0.3
    assert figures["cpu_ratio"] == figures["cpu_s"]["sklearn"] / figures["cpu_s"]["torch"]
    again = benchmark(weights, *sets, "--C", 0, "--work", tmp_path / "work")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
