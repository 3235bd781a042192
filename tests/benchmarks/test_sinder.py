"""The benchmark of singular defects at toy size: plain sides and ours agree, and its figures are there."""

import json

import pytest

from tests.benchmarks.running import benchmark


def figures(arguments: str) -> dict:
    run = benchmark("sinder", *arguments.split())
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])["sizes"]


def test_sampling_finds_the_directions_of_the_closed_form() -> None:
    sizes = figures(
        "directions --sizes tiny tiny_swiglu --sampled tiny tiny_swiglu --samples 5000 --repeats 2"
    )
    for found in sizes.values():
        seconds = {side: times["median"] for side, times in found["seconds"].items()}
        assert set(seconds) == {"closed form", "lstsq", "normal equations"}
        assert found["smallest_cosine_with_sampled"] > 0.98
        assert found["smallest_cosine_between_samplings"] < 0.9999  # their seeds differ
        speedup = seconds["lstsq"] / seconds["closed form"]
        assert found["speedup_of_medians"]["lstsq"] == pytest.approx(speedup)


def test_both_sides_repair_alike() -> None:
    options = "--image-size 224 --batches 1 2 --check 8 --images 2 --clean 0 --repeats 1"
    for found in figures(f"repair --sizes tiny tiny_swiglu {options}").values():
        losses = found["losses_of_first_images"]
        assert len(losses) == 8 and sum(loss > 0 for loss in losses) > 1
        assert found["largest_relative_difference"] < 1e-4
        rates = {side: rate["median"] for side, rate in found["images_per_s"].items()}
        assert set(rates) == {"plain", "batch 1", "batch 2"}
        for side in ("batch 1", "batch 2"):  # one turn: its median is itself
            assert found["speedup"][side]["median"] == pytest.approx(rates[side] / rates["plain"])
        assert found["clean_images_percent"]["plain"] == found["clean_images_percent"]["batch 1"]


@pytest.mark.parametrize("wrong", ["repair --images 6", "directions --repeats 0"])
def test_wrong_input_is_one_line(wrong: str) -> None:
    run = benchmark("sinder", *wrong.split())
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
