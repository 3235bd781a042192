"""Where the time of `loader.py`'s sides goes, and whether their crops are equal."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from loader_baseline import Lap
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config.derived import drop_path_rates
from pretrain.config.schema import Config
from pretrain.data.augment import CHANGES, cut_box, to_planes
from pretrain.data.collate import collate
from pretrain.data.decode import decode
from pretrain.data.draw_params import encode_draws
from pretrain.data.draws import CropDraw, draw_crops
from pretrain.data.drop_path import drop_subsets
from pretrain.data.group import GroupMaker
from pretrain.data.masking import group_masks
from pretrain.data.pixels import Pixels
from pretrain.data.slots import GroupArrays, SlotLayout
from pretrain.seeding import numpy_stream

REST = "flip, grayscale, solarize"
# DINOv2's transforms as torchvision runs them on Pillow images, measured apart: milliseconds an image.
REFERENCE_BITS = 2.58  # a pixel, of images of 0.188 MP
REFERENCE_MS = {
    "decode": 1.00,
    "crop + resize": 5.35,
    "jitter": 5.88,
    "blur": 6.24,
    "to tensor": 1.14,
    REST: 0.24,
}
Changes = Mapping[str, Callable[[Pixels, CropDraw], Pixels]]
CROPS = ("global_crops", "local_crops")  # fields of a batch


class Stopwatch:
    """CPU seconds by stage: a lap books the time since the one before."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._last = 0.0

    def start(self) -> None:
        """Begin, or go on after other work."""
        self._last = time.process_time()

    def lap(self, stage: str) -> None:
        """End a stage; reading the clock is in nobody's time."""
        self.seconds[stage] += time.process_time() - self._last
        self._last = time.process_time()


class StagedLoader:
    """What `GroupMaker` and `collate` do, in the same functions of the package, with laps in between."""

    def __init__(self, cfg: Config, images: int) -> None:
        self.cfg, self.images = cfg, images
        self.maker = GroupMaker(cfg)
        self.slot = SlotLayout(cfg, cfg.data.group_size).allocate()

    @torch.inference_mode()
    def epoch(self, lap: Lap) -> Iterator[Batch]:
        """The whole batches of an epoch; each is valid until the next."""
        size = self.cfg.data.group_size
        for first in range(0, self.images, size):
            out = self.slot.group(0)
            for i in range(size):
                self._crops(first + i, out, i, lap)
            self._draw_groups(first, out)
            batch = collate(self.slot, first)
            lap("masks + collate")
            yield batch

    def _crops(self, position: int, out: GroupArrays, number: int, lap: Lap) -> None:
        place = self.maker.order.at(position)
        item = self.maker.reader.read(place.shard, place.index)
        lap("read")
        data = self.cfg.data
        image = decode(item.image, data.decode, data.channels)
        lap("decode")
        rng = numpy_stream(self.cfg.run.seed, "augment", place.epoch, position)
        draws = draw_crops(rng, image.shape[0], image.shape[1], data)
        lap("draw")
        planes = [*out.global_crops[:, number], *out.local_crops[:, number]]
        _cut(image, [*draws[0], *draws[1]], planes, {} if data.augment_on == "device" else CHANGES, lap)
        if out.global_params is not None and out.local_params is not None:
            out.global_params[:, number], out.local_params[:, number] = map(encode_draws, draws)
            lap("encode draws")

    def _draw_groups(self, first: int, out: GroupArrays) -> None:
        """Masks and drop-path rows."""
        seed, grid = self.cfg.run.seed, self.cfg.data.global_crops.size // self.cfg.model.patch_size
        out.masks[:] = group_masks(self.cfg.mask, grid, len(out.masks), numpy_stream(seed, "mask", 0, first))
        rates = drop_path_rates(self.cfg.model)
        for rows, crops, kind in (
            (out.drop_global, out.global_crops, "global"),
            (out.drop_local, out.local_crops, "local"),
        ):
            rng = numpy_stream(seed, "drop_path", 0, first, kind)
            rows[:] = drop_subsets(rates, crops.shape[0] * crops.shape[1], rng)


def _cut(
    image: Pixels, draws: Sequence[CropDraw], planes: Sequence[Pixels], changes: Changes, lap: Lap
) -> None:
    """The crops of an image, one stage after another, as `pretrain.data.augment` makes them."""
    crops = [cut_box(image, draw.box, out.shape[-1]) for draw, out in zip(draws, planes, strict=True)]
    lap("crop + resize")
    for name, change in changes.items():
        crops = [change(crop, draw) for crop, draw in zip(crops, draws, strict=True)]
        lap(name)
    for crop, out in zip(crops, planes, strict=True):
        to_planes(crop, out)
    lap("to tensor")


def agreement(cfg: Config, plain: Batch, ours: Batch) -> dict[str, float]:
    """How far the normalised crops of the plain side are from our uint8 crops."""
    figures = {}
    for kind in CROPS:
        difference = (_levels(cfg, getattr(plain, kind)) - getattr(ours, kind).float()).abs()
        figures[f"{kind}_mean_difference_levels"] = float(difference.mean())
        figures[f"{kind}_pixels_beyond_8_levels_percent"] = 100 * float((difference > 8).float().mean())
    return figures


def _levels(cfg: Config, crops: Tensor) -> Tensor:
    """(n, 3, S, S) normalised to 0..255."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (cfg.data.mean, cfg.data.std))
    return (crops * std + mean) * 255


def equal_batches(one: Batch, other: Batch) -> bool:
    """Whether all their values are."""
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def shares(stages: Mapping[str, float]) -> dict[str, float]:
    """The share of each stage of the reference, in percent of their sum."""
    known = {name: value for name, value in stages.items() if name in REFERENCE_MS}
    known.setdefault(REST, sum(stages.get(name, 0.0) for name in REST.split(", ")))
    return {name: 100 * known[name] / sum(known.values()) for name in REFERENCE_MS}
