"""The benchmark of augmentation on the device, at toy size: both sides make the same pixels."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def benchmark(arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/augment.py", *arguments.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_both_sides_make_the_same_pixels_and_the_figures_are_there() -> None:
    run = benchmark("--images 2 --repeats 1 --device cpu")
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["mean_difference_grey_levels"] < 0.3  # that of saturation and hue
    assert figures["device_ms_per_batch"] > 0 and figures["worker_cpu_ms_per_image"] > 0


def test_wrong_input_is_refused() -> None:
    run = benchmark("--images 0")
    assert run.returncode == 2 and "--images: must be at least 1" in run.stderr
