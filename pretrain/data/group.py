"""From a position to a finished group: read, decode, augment, and draw masks and drop-path subsets.

A group is `data.group_size` consecutive positions, and the unit of work. It is a pure function of its
position: worker count, world size, accumulation and restarts change neither which images it holds nor how
they are cut.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pretrain.config.derived import drop_path_rates
from pretrain.config.schema import Config
from pretrain.data.augment import augment, cut
from pretrain.data.cache import ShardCache
from pretrain.data.drawn import decode_and_draw
from pretrain.data.draws import Draws
from pretrain.data.drop_path import drop_subsets
from pretrain.data.masking import group_masks
from pretrain.data.mixture import Mixture, Place
from pretrain.data.order import Order
from pretrain.data.pixels import Pixels
from pretrain.data.reader import MAX_OPEN, CorruptSample, Reader
from pretrain.data.remote import is_remote, shown
from pretrain.data.shards import shard_names
from pretrain.data.slots import GroupArrays
from pretrain.errors import InputError
from pretrain.seeding import numpy_stream

MAX_REPLACEMENTS = 100  # samples in a row that may be corrupt


@dataclass
class GroupReport:
    """What making a group took, and the corrupt samples that were met."""

    images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by stage: read, decode, augment
    corrupt: list[CorruptSample] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since


class GroupMaker:
    """Makes the groups of a run; cheap to pickle, and each process opens its own files."""

    def __init__(self, cfg: Config, rank: int = 0, world_size: int = 1) -> None:
        """Find the shards, see to their indexes, and fix the order.

        Args:
            cfg: of the run.
            rank: of this process; ranks share the work of indexing.
            world_size: number of ranks.

        Raises:
            InputError: the data cannot be used; says which setting or shard.
        """
        self.cfg = cfg
        listed = [shard_names(patterns, key) for key, patterns, _ in _sources(cfg)]
        shards = [shard for source in listed for shard in source]
        cache = ShardCache.from_config(cfg.data) if any(map(is_remote, shards)) else None
        max_open = max(MAX_OPEN, 2 * cfg.data.open_shards * len(listed))
        start = rank * len(shards) // world_size
        self.reader = Reader(shards, cache, max_open, start, cfg.data.io_attempts)
        self.order = self._mix([len(source) for source in listed])

    def _mix(self, shard_counts: list[int]) -> Mixture:
        data, orders, first = self.cfg.data, [], 0
        for i, (key, patterns, _) in enumerate(_sources(self.cfg)):
            sizes = self.reader.sizes[first : first + shard_counts[i]]
            first += shard_counts[i]
            if not sum(sizes):
                raise InputError(f"{key}: {', '.join(map(shown, patterns))} hold no sample")
            orders.append(Order(sizes, self.cfg.run.seed, data.shuffle, data.open_shards, source=i))
        return Mixture(orders, [weight for _, _, weight in _sources(self.cfg)])

    @torch.inference_mode()  # without records for a backward pass a resizing starts faster
    def make(self, first: int, out: GroupArrays) -> GroupReport:
        """Fill the arrays with the group that starts at a position.

        Raises:
            InputError: too many samples in a row are corrupt.
            TrainingError: a shard cannot be read any more.
        """
        report = GroupReport()
        for i in range(self.cfg.data.group_size):
            self.make_image(first + i, out, i, report)
        self._draw(first, out)
        return report

    def make_image(self, position: int, out: GroupArrays, number: int, report: GroupReport) -> None:
        """Cut the crops of the image at a position, as an image of the group.

        A corrupt sample is replaced by the next good one of its source, cut as this position's draws say.
        """
        home = place = self.order.at(position)
        for skip in range(1, MAX_REPLACEMENTS + 1):
            try:
                image, draws = self._read(place, (home.epoch, position), report)
            except CorruptSample as error:
                report.corrupt.append(error)
                place = self.order.at(position, skip)
                continue
            with report.stage("augment"):
                _cut(image, draws, out, number)
            report.images += 1
            return
        last = report.corrupt[-1]
        raise InputError(f"{last}; {MAX_REPLACEMENTS} samples in a row are corrupt; repair the data")

    def _read(self, place: Place, draw: tuple[int, int], report: GroupReport) -> tuple[Pixels, Draws]:
        """The pixels of a sample and the draws of its crops, from the stream (epoch, position)."""
        with report.stage("read"):
            item = self.reader.read(place.shard, place.index)
        with report.stage("decode"):
            rng = numpy_stream(self.cfg.run.seed, "augment", *draw)
            try:
                return decode_and_draw(item.image, self.cfg.data, rng)
            except ValueError as error:
                raise CorruptSample(item.shard, item.key, str(error)) from error

    def _draw(self, first: int, out: GroupArrays) -> None:
        """Masks and drop-path subsets of the group."""
        seed, place = self.cfg.run.seed, (self.order.at(first).epoch, first)
        grid = self.cfg.data.global_crops.size // self.cfg.model.patch_size
        out.masks[:] = group_masks(self.cfg.mask, grid, len(out.masks), numpy_stream(seed, "mask", *place))
        rates = drop_path_rates(self.cfg.model)
        for rows, crops, kind in (
            (out.drop_global, out.global_crops, "global"),
            (out.drop_local, out.local_crops, "local"),
        ):
            count = crops.shape[0] * crops.shape[1]
            drawn = drop_subsets(rates, count, numpy_stream(seed, "drop_path", *place, kind))
            if rows is not None and drawn is not None:
                rows[:] = drawn


def _cut(image: Pixels, draws: Draws, out: GroupArrays, number: int) -> None:
    """Crops of an image, finished or, where the device augments, with what is left to do."""
    crops = out.global_crops[:, number], out.local_crops[:, number]
    if out.global_params is None or out.local_params is None:
        augment(image, draws, *crops)
    else:
        out.global_params[:, number], out.local_params[:, number] = cut(image, draws, *crops)


def _sources(cfg: Config) -> list[tuple[str, list[str], float]]:
    """Setting, patterns and weight of each source."""
    if not cfg.data.sources:
        return [("data.shards", cfg.data.shards, 1.0)]
    return [(f"data.sources.{i}.shards", s.shards, s.weight) for i, s in enumerate(cfg.data.sources)]
