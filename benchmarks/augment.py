"""What augmentation on the device costs a batch: `data.augment_on=device` moves flips, colours and blur.

    python benchmarks/augment.py --images 64
    python benchmarks/augment.py --images 4 --device cpu      # seconds

Crops of DINOv2's sizes, with its draws. Compared are the operations on the device, for the whole batch, and
the same on a CPU core, image by image, as a worker does them. Turns alternate; times are process CPU time on
a CPU, events on a GPU. The last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from arguments import at_least
from step_cost import device_name, durations, now
from torch import Tensor

from pretrain.command_line import Parser, exit_status
from pretrain.config.schema import DataConfig
from pretrain.data.augment import apply, resize
from pretrain.data.device_augment import augment_on_device
from pretrain.data.draw_params import encode_draws
from pretrain.data.draws import Box, CropDraw, draw_crops
from pretrain.seeding import numpy_stream
from pretrain.session import pick_device

SIDE = 256  # pixels of the image that crops are drawn from
Figures = dict[str, Any]


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="augment.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    count = at_least(1)
    parser.add_argument("--images", type=count, default=16, help="of a batch; default 16")
    parser.add_argument("--repeats", type=count, default=5, help="turns after one to warm up; default 5")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=count, default=1, help="on a CPU; default 1")
    return parser.parse_args()


def drawn(images: int, cfg: DataConfig) -> dict[int, list[CropDraw]]:
    """Draws of all crops of a batch, by their size in pixels."""
    found: dict[int, list[CropDraw]] = {cfg.global_crops.size: [], cfg.local_crops.size: []}
    for index in range(images):
        large, small = draw_crops(numpy_stream(0, "augment", index), SIDE, SIDE, cfg)
        found[cfg.global_crops.size] += large
        found[cfg.local_crops.size] += small
    return found


def texture(number: int, size: int) -> Tensor:
    """(number, 3, size, size) uint8: coarse colours, as photographs have, with noise."""
    rng = numpy_stream(0, "pixels", size)
    coarse = rng.integers(0, 256, (number, 8, 8, 3), np.uint8)
    smooth = np.stack([resize(image, size) for image in coarse]).astype(np.int16)
    noisy = (smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(noisy.transpose(0, 3, 1, 2).copy())


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, by the clock of the device."""
    points = [now(device)]
    work()
    points.append(now(device))
    return durations(points)[0]


def measure(options: argparse.Namespace, device: torch.device) -> Figures:
    """Seconds of both sides, and how far their pixels are apart."""
    draws = drawn(options.images, DataConfig())
    crops = {size: texture(len(of_size), size) for size, of_size in draws.items()}
    there = {size: batch.to(device) for size, batch in crops.items()}
    params = {size: encode_draws(of_size) for size, of_size in draws.items()}

    def on_device() -> list[Tensor]:
        return [augment_on_device(there[size], params[size]) for size in draws]

    def by_worker() -> list[np.ndarray[Any, Any]]:
        return [
            np.stack([_uncropped(crop, draw, size) for crop, draw in zip(crops[size], of_size, strict=True)])
            for size, of_size in draws.items()
        ]

    apart = _apart(on_device(), by_worker())
    turns = [
        (seconds(on_device, device), seconds(by_worker, torch.device("cpu"))) for _ in range(options.repeats)
    ]
    ours, worker = (median(side) for side in zip(*turns, strict=True))
    return {
        "device_ms_per_batch": round(1000 * ours, 3),
        "device_ms_per_image": round(1000 * ours / options.images, 4),
        "worker_cpu_ms_per_image": round(1000 * worker / options.images, 4),
        "worker_time_by_device_time": round(worker / ours, 2),
        "mean_difference_grey_levels": round(apart, 4),
    }


def _uncropped(crop: Tensor, draw: CropDraw, size: int) -> np.ndarray[Any, Any]:
    """What a worker does after cutting and resizing: here the box is the whole crop."""
    pixels = np.ascontiguousarray(crop.permute(1, 2, 0).numpy())
    return apply(pixels, replace(draw, box=Box(0, 0, size, size)), size)


def _apart(mine: list[Tensor], others: list[np.ndarray[Any, Any]]) -> float:
    """Mean difference of pixels, in grey levels."""
    pairs = zip(mine, others, strict=True)
    means = [np.abs(a.cpu().permute(0, 2, 3, 1).numpy().astype(float) - b).mean() for a, b in pairs]
    return float(np.mean(means))


def main() -> int:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    figures = {
        **vars(options),
        "device": device_name(device),
        "torch": torch.__version__,
        **measure(options, device),
    }
    for key, value in figures.items():
        print(f"{key}: {value}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("augment.py", main))
