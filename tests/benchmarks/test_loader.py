"""The loader benchmark on a handful of images: both sides cut the same crops, and its figures are there."""

import json

import pytest

from tests.benchmarks.running import benchmark

TOY = "--images 6 --batch 3 --repeats 1 --bits 2.5"
STAGES = {"read", "decode", "draw", "crop + resize", "to tensor", "masks + collate"}
CHANGES = {"flip", "jitter", "grayscale", "blur", "solarize"}


@pytest.fixture(scope="module")
def output() -> list[str]:
    run = benchmark("loader", *TOY.split())
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def figures(output: list[str]) -> dict:
    return json.loads(output[-1])["data_sets"][0]


SIDES = ("cpu", "device")


@pytest.mark.parametrize("side", SIDES)
def test_both_sides_cut_the_same_crops(figures: dict, side: str) -> None:
    crops = figures["crops_against_plain"][side]
    assert 0 < crops["global_crops_mean_difference_levels"] < 0.5
    assert 0 < crops["local_crops_mean_difference_levels"] < 0.5
    assert crops["masks_and_staged_batches_equal"] is True


def test_the_images_have_the_bits_asked(figures: dict) -> None:
    assert figures["bits_per_pixel"] == pytest.approx(2.5, rel=0.1)
    assert figures["megapixels_per_image"] == pytest.approx(0.19, rel=0.3)


def test_the_figures_agree_with_each_other(figures: dict) -> None:
    times = {side: values["median"] for side, values in figures["cpu_ms_per_image"].items()}
    assert set(times) == set(figures["stages_cpu_ms_per_image"]) == {"plain", *SIDES}
    for side, stages in figures["stages_cpu_ms_per_image"].items():
        assert figures["images_per_cpu_s"][side] == pytest.approx(1000 / times[side])
        assert set(stages) >= (STAGES - CHANGES if side == "device" else STAGES | CHANGES)
    for side in SIDES:
        assert figures["speedup"][side]["median"] == pytest.approx(times["plain"] / times[side])
    assert figures["device_work"]["ms_per_image"]["median"] > 0
    assert sum(figures["plain_shares_percent"].values()) == pytest.approx(100)


def test_it_says_whether_the_plain_side_is_the_reference(output: list[str]) -> None:
    assert [line for line in output if line.startswith("the shares of 5 stages, 30 % allowed: ")]


def test_wrong_input_is_refused() -> None:
    run = benchmark("loader", "--images", "7", "--batch", "3")
    assert run.returncode == 2
    assert "--images: 7 is not a multiple of --batch=3" in run.stderr and "Traceback" not in run.stderr
