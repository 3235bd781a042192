"""Micro-batches of a training run, step by step, on the device.

Reading is a pure function of the position (`group.py`), so all that is ever saved is where a run stands.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain import distributed
from pretrain.batch import Batch
from pretrain.config.schema import Config
from pretrain.data.ahead import ShardsAhead
from pretrain.data.collate import collate
from pretrain.data.corrupt import CorruptLog
from pretrain.data.counters import Counters
from pretrain.data.device_copy import DeviceCopier
from pretrain.data.group import GroupMaker
from pretrain.data.pool import InlinePool, Pool, WorkerPool
from pretrain.data.slots import LocalSlots, SharedSlots, SlotLayout
from pretrain.data.workers import Task
from pretrain.errors import InputError

CPU = torch.device("cpu")


@dataclass
class _Pending:
    """A micro-batch that is being made."""

    slot: int
    position: int
    groups_left: int


class TrainLoader:
    """The training data of one rank."""

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        folder: Path | None = None,
    ) -> None:
        """Find the shards and see to their indexes; no worker starts yet.

        Args:
            cfg: of the run.
            device: where batches go.
            micro_batch: images in one forward on one device, whole groups (`micro_batch_size(cfg)`).
            rank: of this process.
            world_size: processes that train together.
            folder: where corrupt samples are listed; None = nowhere.

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
        self.maker = GroupMaker(cfg, rank, world_size)
        self.layout = SlotLayout(cfg, micro_batch)
        self.counters = Counters(cfg.data.workers)
        name = "corrupt.tsv" if rank == 0 else f"corrupt_rank{rank}.tsv"
        self.corrupt = CorruptLog(folder / name if folder is not None else None, cfg.data.max_corrupt)
        self.origin = 0  # position of step 0, had all steps taken the batch of this session

    @property
    def num_samples(self) -> int:
        """Images in the data set, that is, in an epoch."""
        return len(self.maker.order)

    def position(self, step: int) -> int:
        """Images that the run has read before a step."""
        return self.origin + step * self.cfg.optim.global_batch_size

    def state_dict(self, step: int) -> dict[str, Any]:
        """Where the run stands after so many steps: a few integers."""
        position = self.position(step)
        sources = zip(self.maker.order.orders, self.maker.order.source_positions(position), strict=True)
        return {
            "seed": self.cfg.run.seed,
            "position": position,
            "num_samples": self.num_samples,
            "sources": [{"samples": len(order), "epoch": read // len(order)} for order, read in sources],
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on where a run stood that had done so many steps, of whatever batch size."""
        self.origin = state["position"] - step * self.cfg.optim.global_batch_size

    def steps(self, first: int, last: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its micro-batches with uint8 crops) for each step in [first, last).

        A batch is valid until the next step is asked for: on a CPU its crops are a slot of the workers.

        Raises:
            InputError: too many samples are corrupt.
            TrainingError: a shard cannot be read, or a worker cannot be kept alive.
        """
        if first >= last:
            return
        feed = _Feed(self, self._positions(first, last))
        try:
            for step in range(first, last):
                yield step, feed.take(self.cfg.engine.accumulation_steps)
        finally:
            feed.close()

    def _positions(self, first: int, last: int) -> Iterator[int]:
        """Where each micro-batch of this rank begins."""
        accumulation = self.cfg.engine.accumulation_steps
        for step in range(first, last):
            for i in range(accumulation):
                yield self.position(step) + (self.rank * accumulation + i) * self.micro_batch

    @property
    def num_slots(self) -> int:
        """Micro-batches in memory: those of a step, and enough ahead for each worker to have its groups."""
        groups = self.micro_batch // self.cfg.data.group_size
        ahead = -(-self.cfg.data.workers * self.cfg.data.prefetch // groups)
        return self.cfg.engine.accumulation_steps + ahead


class _Feed:
    """One session of loading: slots, workers, and the micro-batches under way."""

    def __init__(self, loader: TrainLoader, positions: Iterator[int]) -> None:
        self.loader, self.positions = loader, positions
        self.group_size = loader.cfg.data.group_size
        self.slots: SharedSlots | LocalSlots
        self.pool: Pool
        data, count = loader.cfg.data, loader.num_slots
        if data.workers:
            self.slots = SharedSlots(loader.layout, count, distributed.free_memory(CPU))
            self.pool = WorkerPool(loader.maker, self.slots, data.workers, data.worker_timeout)
        else:
            self.slots = LocalSlots(loader.layout, count)
            self.pool = InlinePool(loader.maker, self.slots)
        self.copier = DeviceCopier(loader.device, self.slots)
        self.shards_ahead = ShardsAhead(loader.maker.reader, loader.maker.order)
        self.free = deque(range(count))
        self.pending: deque[_Pending] = deque()
        self.ahead: list[Batch] = []  # of the next step, on their way to the device

    def take(self, count: int) -> list[Batch]:
        """The next micro-batches; those of the step before are not valid any more."""
        self.free.extend(self.copier.release())  # on a CPU those of the step before
        batches, self.ahead = self.ahead, []
        while len(batches) < count:
            batches.append(self._next())
        arrived = [self.copier.arrived(batch) for batch in batches]
        self._look_ahead(count)
        return arrived

    def _look_ahead(self, count: int) -> None:
        """Start what can be started for the next step without waiting."""
        self._schedule()
        if not self.copier.overlaps:
            return
        self._collect(seconds=0)
        while len(self.ahead) < count and self.pending and not self.pending[0].groups_left:
            self.ahead.append(self._next())

    def _next(self) -> Batch:
        self._schedule()
        while self.pending[0].groups_left:
            self._collect(seconds=None)
        done = self.pending.popleft()
        arrays = self.slots.arrays(done.slot)
        batch = collate(arrays, done.position, self.loader.cfg.mask.bucket)
        return self.copier.send(batch, done.slot, arrays)

    def _schedule(self) -> None:
        """Give every free slot a micro-batch to come."""
        if self.copier.overlaps:
            self.free.extend(self.copier.release(wait=not self.free and not self.pending))
        while self.free and (position := next(self.positions, None)) is not None:
            self.shards_ahead.look(position)
            slot, groups = self.free.popleft(), self.loader.micro_batch // self.group_size
            self.pending.append(_Pending(slot, position, groups))
            for group in range(groups):
                self.pool.submit(Task(slot, group, position + group * self.group_size))

    def _collect(self, seconds: float | None) -> None:
        for done in self.pool.wait(seconds):
            if done.error is not None:
                raise done.error
            self.loader.counters.add(done)
            self.loader.corrupt.add(done.report.images, done.report.corrupt)
            next(p for p in self.pending if p.slot == done.task.slot).groups_left -= 1

    def close(self) -> None:
        """End the workers."""
        self.shards_ahead.close()
        self.pool.close()
        self.copier.close()
