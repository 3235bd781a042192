"""Our loader against a plain DINOv2 loader: images a CPU second of one worker, from shard to batch.

    python benchmarks/loader.py
    python benchmarks/loader.py --images 8 --batch 4 --repeats 1 --bits 2.5    # takes seconds

All sides read the same shards, which are made first, and cut the same crops from the same draws: 2 of 224
and 8 of 96 pixels, blur in the papers' probabilities. The plain side (`loader_baseline.py`) ends in float32
batches. Ours end in uint8 slots that the model normalises: `cpu` does all else, `device` leaves what follows
the resizing to the device, whose work is measured apart. They take turns batch by batch in random order;
times are CPU time of the process on one thread, and a speed-up is that of a whole repetition. They hold the
page faults of large arrays, unless MALLOC_MMAP_MAX_=0 and a huge MALLOC_TRIM_THRESHOLD_ make the C library
keep its memory. The last line of the output is one JSON object.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import cv2
import torch
from arguments import at_least
from loader_baseline import Lap, PlainLoader, untimed
from loader_images import DataSet, write_images
from loader_report import report
from loader_stages import StagedLoader, Stopwatch, agreement, equal_batches, shares

from pretrain.batch import Batch
from pretrain.command_line import Parser, exit_status
from pretrain.config import schema
from pretrain.config.checks import check
from pretrain.config.schema import Config
from pretrain.data.collate import collate
from pretrain.data.device_augment import augment_on_device
from pretrain.data.group import GroupMaker
from pretrain.data.slots import SlotLayout
from pretrain.errors import InputError

PLAIN = "plain"  # the side that ours are compared with
TOTAL = "all"  # the stage of what is not timed in stages
PACKAGES = ("torch", "pillow", "numpy", "opencv-python-headless", "simplejpeg", "webdataset")
Figures = dict[str, Any]
Stages = Mapping[str, float]  # CPU seconds by stage


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="loader.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, default: object, text: str, **rest: Any) -> None:
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})", **rest)

    add("images", 96, "in the data set, a multiple of the batch", type=at_least(2), metavar="N")
    add("batch", 32, "images in a batch", type=at_least(2), metavar="B")
    add(
        "repeats",
        9,
        "times each side loads the data set, after a warm-up",
        type=at_least(1),
        metavar="N",
    )
    add("bits", [2.5, 5.0], "a pixel; a data set for each", type=float, nargs="+", metavar="BITS")
    add("seed", 0, "of the images, the draws and the order of turns", type=int)
    options = parser.parse_args()
    if options.images % options.batch:
        raise InputError(f"--images: {options.images} is not a multiple of --batch={options.batch}")
    return options


def configurations(shards: Sequence[Path], batch: int, seed: int) -> dict[str, Config]:
    """By side: the short recipe on these shards, read as they lie, as webdataset reads them."""
    data = schema.DataConfig(
        shards=[str(shard) for shard in shards],
        shuffle="none",
        group_size=batch,
        augment=schema.AugmentConfig(blur="paper"),
    )
    cfg = Config(
        run=schema.RunConfig(seed=seed),
        data=data,
        optim=schema.OptimConfig(global_batch_size=batch),
        engine=schema.EngineConfig(device="cpu"),
    )
    check(cfg)
    return {PLAIN: cfg, "cpu": cfg, "device": replace(cfg, data=replace(data, augment_on="device"))}


class OurLoader:
    """What a worker does, with the package's own classes."""

    def __init__(self, cfg: Config, images: int) -> None:
        self.images, self.size = images, cfg.data.group_size
        self.maker = GroupMaker(cfg)
        self.slot = SlotLayout(cfg, self.size).allocate()

    def epoch(self) -> Iterator[Batch]:
        """The whole batches of an epoch; each is valid until the next."""
        for first in range(0, self.images, self.size):
            self.maker.make(first, self.slot.group(0))
            yield collate(self.slot, first)

    def finished(self, batch: Batch) -> Batch:
        """The last batch with what the device has to do to its crops done, where that is."""
        rows, crops = (
            (self.slot.global_params, self.slot.local_params),
            (batch.global_crops, batch.local_crops),
        )
        if rows[0] is None or rows[1] is None:
            return batch
        done = [augment_on_device(c, r.reshape(len(c), -1)) for c, r in zip(crops, rows, strict=True)]
        return replace(batch, global_crops=done[0], local_crops=done[1])


class Contestant(NamedTuple):
    """Something that loads an epoch, timed as a whole or in stages."""

    side: str
    staged: bool
    epoch: Callable[[Lap], Iterator[Batch]]


def contestants(cfgs: Mapping[str, Config], images: int) -> list[Contestant]:
    """Each side, whole and in stages."""
    players = []
    for side, cfg in cfgs.items():
        plain, ours, staged = PlainLoader(cfg), OurLoader(cfg, images), StagedLoader(cfg, images)
        whole = plain if side == PLAIN else ours
        players.append(Contestant(side, False, lambda lap, whole=whole: whole.epoch()))
        players.append(Contestant(side, True, plain.staged if side == PLAIN else staged.epoch))
    return players


def repetition(players: Sequence[Contestant], batches: int, order: random.Random) -> list[Stages]:
    """CPU seconds by stage of each contestant for an epoch: turns of a batch, in random order."""
    watches = [Stopwatch() for _ in players]
    epochs = [player.epoch(watch.lap) for player, watch in zip(players, watches, strict=True)]
    turns = list(zip(epochs, watches, strict=True))
    for _ in range(batches):
        for epoch, watch in order.sample(turns, len(turns)):
            watch.start()
            next(epoch)
            watch.lap(TOTAL)
    return [watch.seconds for watch in watches]


def compare_crops(cfg: Config, images: int) -> Figures:
    """How equal the crops are: plain and ours, and each whole and in stages. It warms everything up, too."""
    plain, loader, staged = PlainLoader(cfg), OurLoader(cfg, images), StagedLoader(cfg, images)
    epochs = (plain.epoch(), loader.epoch(), plain.staged(untimed), staged.epoch(untimed))
    rows, equal = [], True
    for theirs, own, theirs_staged, own_staged in zip(*epochs, strict=True):
        rows.append(agreement(cfg, theirs, loader.finished(own)))
        equal &= equal_batches(theirs, theirs_staged) and equal_batches(own, own_staged)
        equal &= torch.equal(theirs.masks, own.masks)
    means = {name: mean(row[name] for row in rows) for name in rows[0]}
    return {**means, "masks_and_staged_batches_equal": equal}


def device_work(cfg: Config, images: int, repeats: int) -> Figures:
    """What the device does to a batch when it augments, alone: milliseconds an image."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader, times = OurLoader(cfg, images), []
    batch = next(loader.epoch()).to(device)
    for _ in range(1 + repeats):
        since = device_clock(device)
        loader.finished(batch)
        times.append(1e3 * (device_clock(device) - since) / batch.num_images)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU thread"
    return {"device": name, "ms_per_image": spread(times[1:])}


def device_clock(device: torch.device) -> float:
    """Seconds: of CPU time on a CPU; by the wall on a GPU, once it has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(data: DataSet, options: argparse.Namespace) -> Figures:
    """All figures of a data set."""
    cfgs = configurations(data.shards, options.batch, options.seed)
    crops = {side: compare_crops(cfg, data.images) for side, cfg in cfgs.items() if side != PLAIN}
    players, order = contestants(cfgs, data.images), random.Random(options.seed)
    batches = data.images // options.batch
    results = [repetition(players, batches, order) for _ in range(options.repeats)]
    stages, times = {}, {}
    for player, seconds in zip(players, zip(*results, strict=True), strict=True):
        if player.staged:
            stages[player.side] = stage_medians(seconds, data.images)
        else:
            times[player.side] = [1e3 * one[TOTAL] / data.images for one in seconds]
    return {
        "bits_per_pixel": data.bits_per_pixel,
        "kilobytes_per_image": data.kilobytes,
        "megapixels_per_image": data.megapixels,
        "images_per_cpu_s": {side: 1e3 / median(values) for side, values in times.items()},
        "cpu_ms_per_image": {side: spread(values) for side, values in times.items()},
        "speedup": {side: spread(ratios(times[PLAIN], times[side])) for side in crops},
        "stages_cpu_ms_per_image": stages,
        "plain_shares_percent": shares(stages[PLAIN]),
        "crops_against_plain": crops,
        "device_work": device_work(cfgs["device"], data.images, options.repeats),
    }


def stage_medians(seconds: Sequence[Stages], images: int) -> dict[str, float]:
    """Milliseconds an image by stage."""
    names = [name for name in seconds[0] if name != TOTAL]
    return {name: 1e3 * median([one[name] for one in seconds]) / images for name in names}


def ratios(theirs: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times as fast ours was in each repetition."""
    return [a / b for a, b in zip(theirs, own, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """The middle and both ends."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def setting(options: argparse.Namespace) -> Figures:
    """What the figures hold for."""
    return {
        **vars(options),
        "versions": {package: version(package) for package in PACKAGES},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    """Measure, print the tables and the JSON line."""
    options = parse()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    figures = setting(options)
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    figures["data_sets"] = []
    for bits in options.bits:
        with tempfile.TemporaryDirectory() as folder:
            data = write_images(Path(folder), options.images, bits, options.seed)
            figures["data_sets"].append({"bits_per_pixel_asked": bits, **measure(data, options)})
        print("\n".join(report(figures["data_sets"][-1])), flush=True)
    print(f"\n{json.dumps(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("loader.py", main))
