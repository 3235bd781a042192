"""Run the loader of a config alone: how fast is it, where does its time go, what do the crops look like?

    python tools/loader.py configs/vitl_mlp.yaml data.workers=8
    python tools/loader.py configs/demo.yaml --images 256 --sheet crops.png

Nothing is trained and the run folder is not touched.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from pretrain.analysis.crops import crop_picture
from pretrain.batch import Batch
from pretrain.command_line import Parser, exit_status
from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.data.counters import STAGES
from pretrain.data.loader import TrainLoader

ROWS = 8  # images on the sheet


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings to change")
    parser.add_argument("--images", type=int, default=2_048, metavar="N", help="to load (default 2,048)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="picture of the crops of the first images")
    options = parser.parse_intermixed_args()
    if options.images < 1:
        parser.error(f"--images {options.images}: must be at least 1")
    if options.sheet is not None:  # before the time is spent
        _check_sheet(parser, options.sheet)
    return options


def _check_sheet(parser: Parser, sheet: Path) -> None:
    if sheet.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--sheet {sheet}: no kind of picture ends so; name it {sheet.stem}.png")
    if not sheet.parent.is_dir():
        parser.error(f"--sheet {sheet}: there is no folder {sheet.parent}; make it")


def one_rank(cfg: Config) -> Config:
    """The config with one group as its whole batch: what one rank's workers do does not depend on more."""
    return replace(
        cfg,
        engine=replace(cfg.engine, accumulation_steps=1),
        optim=replace(cfg.optim, global_batch_size=cfg.data.group_size),
    )


def timed(batches: Iterator[Batch]) -> tuple[Batch, int, float]:
    """The first batch, which waits for the workers to start, and images and seconds of those after it."""
    first = next(batches).clone()
    images, since = 0, time.perf_counter()
    for batch in batches:
        images += batch.num_images
    return first, images, time.perf_counter() - since


def lines(cfg: Config, loader: TrainLoader, images: int, seconds: float) -> Iterator[str]:
    """The table."""
    means, workers = loader.counters.means(), cfg.data.workers
    per_image = sum(means[f"{stage}_ms"] for stage in STAGES)
    yield f"{loader.num_samples} samples; {workers} workers, groups of {cfg.data.group_size} images"
    yield f"slots     {loader.num_slots} x {loader.layout.nbytes / 2**20:.0f} MiB of shared memory"
    if images:
        yield f"speed     {images / seconds:.0f} images/s over {images} images in {seconds:.1f} s"
    yield f"a worker  {1e3 / per_image:.0f} images/s at most, {per_image:.2f} ms per image:"
    for stage in STAGES:
        value = means[f"{stage}_ms"]
        yield f"  {stage:8}{value:7.2f} ms  {100 * value / per_image:3.0f} %"
    if workers:
        yield f"waiting for a slot: {means['slot_wait_percent']:.0f} % of the workers' time"
    yield f"corrupt samples: {means['corrupt']:.0f}"


def run() -> int:
    """Load, print, draw."""
    options = parse()
    cfg = one_rank(load_config(options.config, options.overrides))
    steps = max(1, -(-options.images // cfg.data.group_size)) + 1
    loader = TrainLoader(cfg, torch.device("cpu"), cfg.data.group_size)
    first, images, seconds = timed(batch for _, (batch,) in loader.steps(0, steps))
    print("\n".join(lines(cfg, loader, images, seconds)))
    if options.sheet is not None:
        rows = min(ROWS, first.num_images)
        pixels = crop_picture(first, rows, cfg.model.patch_size)
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(options.sheet)
        print(f"{options.sheet}: the crops of the first {rows} images")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("loader.py", run))
