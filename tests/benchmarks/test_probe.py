"""The benchmark of the probes at toy size: both solvers say the same, and its figures are there."""

import json
from pathlib import Path

from tests.analysis.inputs import write_model
from tests.benchmarks.running import benchmark
from tests.small import small_model


def test_both_solvers_fit_every_place_alike(shards: Path, tmp_path: Path) -> None:
    model = small_model()
    weights = write_model(tmp_path / "vit.safetensors", model)
    sets = ("--train", shards / "test-*.tar", "--test", shards / "train-*.tar")
    run = benchmark("probe", weights, *sets, "--C", 0.1, 1, "--work", tmp_path / "work", threads=1)
    assert run.returncode == 0, run.stderr
    *lines, last = run.stdout.splitlines()
    figures = json.loads(last)
    assert len(lines) == 2 and figures["probes"] == 20  # ten places a block
    assert figures["converged"] == {"torch": 20, "sklearn": 20}
    assert figures["largest_test_difference_points"] < 0.3
    assert figures["cpu_ratio"] == figures["cpu_s"]["sklearn"] / figures["cpu_s"]["torch"]
    again = benchmark("probe", weights, *sets, "--C", 0, "--work", tmp_path / "work", threads=1)
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
