from dataclasses import replace

import pytest

from pretrain.run.fastest_setting import SELECTIVE, choose
from pretrain.run.flops import flops_per_image
from pretrain.run.footprint import Footprint, crop_bytes
from pretrain.run.trial import Trial
from tests.small import small_config

MIB = 2**20
MEMORY = Footprint(backbone=MIB, heads=0, drawn=0, drawn_bytes=4)  # a branch 4 MiB, the state 20
KEPT = {"none": 8 * MIB, "selective": 3 * MIB, "full": 1 * MIB}  # of an image
FREE = 10**12


def config(**engine):
    cfg = small_config(optim=replace(small_config().optim, global_batch_size=16))
    return replace(cfg, engine=replace(cfg.engine, **engine))


def trial(images, per_image=1.0, activations=10, **changes):
    """10 MiB an image; a forward of a fifth of the time that grows with the batch."""
    phases = {"draw": 0.5, "teacher": 1.0, "forward": 1.0, "backward": 3.0, "optimizer": 1.5}
    values = {"state": 20 * MIB, "base": 16 * MIB, "activations": activations * images * MIB, "peak": 0}
    return Trial(images, 1, phases, per_image, **{**values, **changes})


def test_the_least_recomputation_that_fits_wins():
    cfg = config(accumulation_steps=4)
    for free, mode in ((70, "none"), (50, "selective"), (40, "full")):  # 60, 40 and 32 MiB in 4 x 4 images
        choice = choose(cfg, [trial(4)], KEPT, MEMORY, free * MIB)
        assert (choice.best.checkpointing, choice.best.accumulation, choice.tried) == (mode, 4, 9)
        assert choice.best.peak <= 0.9 * free * MIB
    assert choice.own.peak > 0.9 * 40 * MIB
    nothing = choose(cfg, [trial(4)], KEPT, MEMORY, 20 * MIB)
    assert nothing.best is None and nothing.smallest.checkpointing == "full"


def test_peaks_exchange_what_the_blocks_keep():
    cfg = config()
    for mode, less in (("none", 0), ("selective", 5), ("full", 7)):
        only = {"none": KEPT["none"], mode: KEPT[mode]}
        found = choose(cfg, [trial(16)], only, MEMORY, FREE)
        assert found.own.peak == (16 + 16 * 10) * MIB  # without gradients: one micro-batch
        smallest = choose(cfg, [trial(16)], only, MEMORY, FREE).smallest
        assert smallest.peak == (20 + 4 * (10 - less)) * MIB + 12 * crop_bytes(cfg)


def test_a_part_of_the_peak_does_not_shrink_with_the_images():
    trials = [trial(8, activations=15), trial(16)]  # 120 and 160 MiB: 80 and 5 an image
    found = choose(config(), trials, {"none": 0.0}, MEMORY, FREE)
    assert found.smallest.peak == (20 + 80 + 4 * 5) * MIB + 12 * crop_bytes(config())


def test_times_hold_the_forwards_and_the_recomputation():
    cfg = config()
    found = choose(cfg, [trial(16)], KEPT, MEMORY, FREE)
    assert found.best == found.own and found.own.seconds == pytest.approx(16 + 2)
    work = flops_per_image(cfg)
    again = 16 * 0.2 * work.backbone / sum(work)
    for mode, share in (("selective", SELECTIVE), ("full", 1.0)):
        other = choose(config(activation_checkpointing=mode), [trial(16)], KEPT, MEMORY, FREE)
        assert other.best.checkpointing == "none" and other.own.seconds == pytest.approx(
            16 + 2
        )  # as measured
        assert other.own.seconds - other.best.seconds == pytest.approx(share * again)


def test_few_large_forwards_win_where_forwards_cost_time_by_themselves():
    trials = [trial(4, per_image=2.0), trial(8)]  # 8 s for 4 and for 8 images
    found = choose(config(accumulation_steps=2), trials, KEPT, MEMORY, FREE)
    assert found.best.accumulation == 1 and found.best.seconds == pytest.approx(8 + 2)
    slower = choose(config(accumulation_steps=2), [trial(4, 1.01), trial(8)], KEPT, MEMORY, FREE)
    assert slower.best == slower.own  # a gain of less than 2 %
