"""Micro-batches of a training run, step by step, on the device.

Reading is a pure function of the position: worker count, world size, accumulation and restarts change neither
which images a position holds nor how they are cut. The unit of work is a group: `data.group_size` consecutive
positions.
"""

import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from multiprocessing.context import BaseContext

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain.batch import Batch
from pretrain.config.derived import drop_path_rates
from pretrain.config.schema import Config
from pretrain.data.augment import augment, cut
from pretrain.data.collate import Group, collate
from pretrain.data.device_augment import augment_on_device
from pretrain.data.draw_params import Rows
from pretrain.data.drawn import decode_and_draw
from pretrain.data.drop_path import drop_subsets
from pretrain.data.masking import group_masks
from pretrain.data.order import Order
from pretrain.data.pixels import Pixels
from pretrain.data.reader import Reader
from pretrain.data.shards import list_shards
from pretrain.data.workers import start_worker
from pretrain.errors import InputError
from pretrain.seeding import numpy_stream

PRELOADED = ["pretrain.data.loader"]  # imported once by the fork server, not by each worker


class Groups(Dataset[Group | InputError]):
    """Groups by the position of their first image."""

    def __init__(self, cfg: Config) -> None:
        """Open the data set of a configuration.

        Raises:
            InputError: `data.shards` cannot be used.
        """
        self.cfg = cfg
        self.reader = Reader(list_shards(cfg.data.shards, "data.shards"))
        if not sum(self.reader.sizes):
            raise InputError(f"data.shards: {', '.join(cfg.data.shards)} hold no sample")
        self.order = Order(self.reader.sizes, cfg.run.seed, cfg.data.shuffle, cfg.data.open_shards)

    def __getitem__(self, position: int) -> Group | InputError:
        """The group that starts at a position; an error is handed over as a value.

        A DataLoader would turn an exception into many lines of text; the one line for the user would be lost.
        """
        try:
            return self._group(position)
        except InputError as error:
            return error

    def _group(self, first: int) -> Group:
        global_crops, local_crops, params = self._read_crops(first)
        size, local_count = self.cfg.data.group_size, self.cfg.data.local_crops.number
        rates = drop_path_rates(self.cfg.model)
        place = (self.order.at(first).epoch, first)
        seed = self.cfg.run.seed
        grid = self.cfg.data.global_crops.size // self.cfg.model.patch_size
        return Group(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=group_masks(self.cfg.mask, grid, 2 * size, numpy_stream(seed, "mask", *place)),
            drop_global=drop_subsets(rates, 2 * size, numpy_stream(seed, "drop_path", *place, "global")),
            drop_local=drop_subsets(
                rates, local_count * size, numpy_stream(seed, "drop_path", *place, "local")
            ),
            position=first,
            params=params,
        )

    def _read_crops(self, first: int) -> tuple[Pixels, Pixels, tuple[Rows, Rows] | None]:
        """(2, gs, C, S, S) and (L, gs, C, s, s) crops of the images from a position on, and what is left."""
        data = self.cfg.data
        large, small = data.global_crops.size, data.local_crops.size
        rows = (data.group_size, data.channels)
        global_crops = np.empty((2, *rows, large, large), np.uint8)
        local_crops = np.empty((data.local_crops.number, *rows, small, small), np.uint8)
        params = [
            self.read_image(first + i, global_crops[:, i], local_crops[:, i]) for i in range(data.group_size)
        ]
        left = [image for image in params if image is not None]
        if not left:
            return global_crops, local_crops, None
        global_params, local_params = (np.stack(kind, axis=1) for kind in zip(*left, strict=True))
        return global_crops, local_crops, (global_params, local_params)

    def read_image(
        self,
        position: int,
        global_out: Pixels,
        local_out: Pixels,
    ) -> tuple[Rows, Rows] | None:
        """Cut the crops of the image at a position into (2, C, S, S) and (L, C, s, s) uint8 arrays.

        With `data.augment_on=device`, returns what is left to do to each crop, as `cut`.
        """
        sample = self.order.at(position)
        item = self.reader.read(sample.shard, sample.index)
        rng = numpy_stream(self.cfg.run.seed, "augment", sample.epoch, position)
        try:
            image, draws = decode_and_draw(item.image, self.cfg.data, rng)
        except ValueError as error:
            shard = self.reader.shards[sample.shard]
            raise InputError(f"{shard}: sample {item.key}: {error}; re-pack the shard without it") from error
        if self.cfg.data.augment_on == "device":
            return cut(image, draws, global_out, local_out)
        augment(image, draws, global_out, local_out)
        return None


class _StepRange(Sampler[list[int]]):
    """The groups of one rank's micro-batches for a range of steps."""

    def __init__(self, cfg: Config, micro_batch: int, rank: int, world_size: int, steps: range) -> None:
        self.cfg, self.micro_batch, self.rank, self.world_size, self.range = (
            cfg,
            micro_batch,
            rank,
            world_size,
            steps,
        )

    def __len__(self) -> int:
        return len(self.range) * self.cfg.engine.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        accumulation, group = self.cfg.engine.accumulation_steps, self.cfg.data.group_size
        for step in self.range:
            for i in range(accumulation):
                start = (
                    step * self.cfg.optim.global_batch_size
                    + (self.rank * accumulation + i) * self.micro_batch
                )
                yield list(range(start, start + self.micro_batch, group))


class TrainLoader:
    """The training data of one rank."""

    def __init__(
        self, cfg: Config, device: torch.device, micro_batch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Find the shards and see to their indexes; no worker starts yet.

        Args:
            cfg: of the run.
            device: where batches go.
            micro_batch: images in one forward on one device, whole groups (`micro_batch_size(cfg)`).
            rank: of this process.
            world_size: processes that train together.

        Raises:
            InputError: the data cannot be used; says which setting or shard.
        """
        images = world_size * cfg.engine.accumulation_steps * micro_batch
        if images != cfg.optim.global_batch_size:
            raise InputError(
                f"optim.global_batch_size={cfg.optim.global_batch_size} is not {world_size} device(s) x "
                f"engine.accumulation_steps={cfg.engine.accumulation_steps} x {micro_batch} images"
            )
        self.cfg, self.device, self.micro_batch = cfg, device, micro_batch
        self.rank, self.world_size = rank, world_size
        self.groups = Groups(cfg)
        self.mean = torch.tensor(cfg.data.mean, device=device)
        self.std = torch.tensor(cfg.data.std, device=device)

    @property
    def num_samples(self) -> int:
        """Images in the data set, that is, in an epoch."""
        return len(self.groups.order)

    def steps(self, first: int, last: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its micro-batches with normalised crops) for each step in [first, last).

        Raises:
            InputError: an image is damaged; names shard and key.
        """
        with warnings.catch_warnings():
            # torch warns twice of more workers than cores, in three lines each.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            batches = iter(self._loader(range(first, last)))
        try:
            for step in range(first, last):
                micro_batches = islice(batches, self.cfg.engine.accumulation_steps)
                yield step, [self._to_device(batch) for batch in micro_batches]
        finally:
            del batches  # ends the workers at once; the traceback of an error would keep them otherwise

    def _to_device(self, batch: Batch | InputError) -> Batch:
        if isinstance(batch, InputError):
            raise batch
        moved = batch.to(self.device, non_blocking=True)
        if batch.global_params is not None and batch.local_params is not None:
            moved = replace(
                moved,
                global_crops=augment_on_device(moved.global_crops, batch.global_params),
                local_crops=augment_on_device(moved.local_crops, batch.local_params),
                global_params=None,
                local_params=None,
            )
        return moved.normalize(self.mean, self.std)

    def _loader(self, steps: range) -> DataLoader[Group | InputError]:
        sampler = _StepRange(self.cfg, self.micro_batch, self.rank, self.world_size, steps)
        workers = self.cfg.data.workers
        return DataLoader(
            self.groups,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_collate_or_error,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=start_worker,
            multiprocessing_context=_fork_server() if workers else None,
            prefetch_factor=self.cfg.data.prefetch if workers else None,
            generator=torch.Generator(),  # else DataLoader draws a number from the global one
        )


def _collate_or_error(groups: Sequence[Group | InputError]) -> Batch | InputError:
    errors = [group for group in groups if isinstance(group, InputError)]
    return errors[0] if errors else collate([group for group in groups if isinstance(group, Group)])


def _fork_server() -> BaseContext:
    """Workers from a clean process: a fork of the training process would copy its locks and CUDA state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
