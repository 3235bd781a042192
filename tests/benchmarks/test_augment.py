"""The benchmark of augmentation on the device, at toy size: both sides make the same pixels."""

import json

from tests.benchmarks.running import benchmark


def test_both_sides_make_the_same_pixels_and_the_figures_are_there() -> None:
    run = benchmark("augment", "--images", "2", "--repeats", "1", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["mean_difference_grey_levels"] < 0.3  # that of saturation and hue
    assert figures["device_ms_per_batch"] > 0 and figures["worker_cpu_ms_per_image"] > 0


def test_wrong_input_is_refused() -> None:
    run = benchmark("augment", "--images", "0")
    assert run.returncode == 2 and "--images: must be a whole number from 1 up, got 0" in run.stderr
