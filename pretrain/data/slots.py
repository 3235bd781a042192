"""Where the images of a micro-batch are written: slots of fixed layout, in memory that processes share.

A worker writes the uint8 crops where the training process reads them; nothing is copied or pickled in
between. The memory has no name, so it is gone with the last process that uses it, however that ends.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np

from pretrain.config.derived import drop_path_rates, kept_rows
from pretrain.config.schema import Config
from pretrain.data.draw_params import WIDTH
from pretrain.data.draw_params import Rows as Params
from pretrain.data.drop_path import Rows
from pretrain.data.masking import Mask
from pretrain.data.pixels import Pixels
from pretrain.errors import InputError

ALIGNMENT = 64  # bytes; a cache line, and enough for any vector instruction


class GroupArrays(NamedTuple):
    """What is known of one group of gs images; the same fields as `SlotArrays`, without the axis n."""

    global_crops: Pixels  # (G, gs, C, S, S) uint8
    local_crops: Pixels  # (L, gs, C, s, s) uint8
    masks: Mask  # (G * gs, N); rows inside a group count crop * gs + image
    drop_global: Rows | None  # (depth, 2, kept) rows of the group's global crops; None = nothing is dropped
    drop_local: Rows | None  # likewise for the local crops
    global_params: Params | None = None  # (G, gs, P) what is left to do to the crops; None = nothing
    local_params: Params | None = None  # (L, gs, P)


@dataclass(frozen=True)
class SlotArrays:
    """A micro-batch of B images in n groups, as the groups are written."""

    global_crops: Pixels  # (G, B, C, S, S) uint8
    local_crops: Pixels  # (L, B, C, s, s) uint8
    masks: Mask  # (n, G * gs, N)
    drop_global: Rows | None  # (n, depth, 2, kept)
    drop_local: Rows | None  # (n, depth, 2, kept)
    global_params: Params | None = None  # (G, B, P)
    local_params: Params | None = None  # (L, B, P)

    @property
    def num_groups(self) -> int:
        """The number of groups, n."""
        return int(self.masks.shape[0])

    @property
    def group_size(self) -> int:
        """Images in a group, gs."""
        return int(self.global_crops.shape[1]) // self.num_groups

    def group(self, number: int) -> GroupArrays:
        """Views of one group."""
        images = slice(number * self.group_size, (number + 1) * self.group_size)
        return GroupArrays(
            self.global_crops[:, images],
            self.local_crops[:, images],
            self.masks[number],
            None if self.drop_global is None else self.drop_global[number],
            None if self.drop_local is None else self.drop_local[number],
            None if self.global_params is None else self.global_params[:, images],
            None if self.local_params is None else self.local_params[:, images],
        )


class _Field(NamedTuple):
    shape: tuple[int, ...]
    dtype: type
    offset: int


class SlotLayout:
    """Where each array of a slot lies."""

    def __init__(self, cfg: Config, micro_batch: int) -> None:
        """Lay out a micro-batch of whole groups."""
        offset = 0
        self.fields: dict[str, _Field] = {}
        for name, shape, dtype in _arrays(cfg, micro_batch):
            self.fields[name] = _Field(shape, dtype, offset)
            offset += -(-prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self.nbytes = offset

    def arrays(self, memory: Any, start: int = 0) -> SlotArrays:
        """Views of a slot that begins at a byte of a buffer."""
        views: dict[str, Any] = dict.fromkeys(field.name for field in fields(SlotArrays))
        for name, field in self.fields.items():
            flat: Any = np.frombuffer(memory, field.dtype, prod(field.shape), start + field.offset)
            views[name] = flat.reshape(field.shape)
        return SlotArrays(**views)

    def allocate(self) -> SlotArrays:
        """A slot of its own in ordinary memory."""
        return self.arrays(bytearray(self.nbytes))


def _arrays(cfg: Config, micro_batch: int) -> Iterator[tuple[str, tuple[int, ...], type]]:
    """Name, shape and type of each array of a micro-batch."""
    data, gs = cfg.data, cfg.data.group_size
    channels, large, small = data.channels, data.global_crops.size, data.local_crops.size
    groups, local, rates = micro_batch // gs, data.local_crops.number, drop_path_rates(cfg.model)
    yield "global_crops", (2, micro_batch, channels, large, large), np.uint8
    yield "local_crops", (local, micro_batch, channels, small, small), np.uint8
    yield "masks", (groups, 2 * gs, (large // cfg.model.patch_size) ** 2), np.bool_
    if any(rates):
        for name, crops in (("drop_global", 2), ("drop_local", local)):
            kept = max(kept_rows(rate, crops * gs) for rate in rates)
            yield name, (groups, len(rates), 2, kept), np.int64
    if data.augment_on == "device":
        yield "global_params", (2, micro_batch, WIDTH), np.float32
        yield "local_params", (local, micro_batch, WIDTH), np.float32


class SharedFile:
    """An open file; sent to a process that is being started, it is the same open file there."""

    def __init__(self, descriptor: int) -> None:
        """Own a descriptor."""
        self.descriptor = descriptor

    def __getstate__(self) -> dict[str, Any]:
        """A duplicate of the descriptor, for that process."""
        return {"descriptor": DupFd(self.descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the duplicate."""
        self.descriptor = state["descriptor"].detach()

    def __del__(self) -> None:
        """Close the descriptor; memory mapped from it stays."""
        os.close(self.descriptor)


class SharedSlots:
    """Slots in shared memory; sent to a process that is being started, they are the same memory there."""

    def __init__(self, layout: SlotLayout, count: int, free_bytes: int) -> None:
        """Reserve the memory.

        Args:
            layout: of a slot.
            count: slots.
            free_bytes: that this machine has left.

        Raises:
            InputError: it does not fit the memory.
        """
        self.layout, self.count = layout, count
        total = layout.nbytes * count
        size = f"{count} slots of {layout.nbytes / 2**20:.0f} MiB for prepared micro-batches"
        advice = "lower data.workers or data.prefetch, or raise engine.accumulation_steps"
        if total > free_bytes:
            raise InputError(
                f"data.workers: {size} do not fit the {free_bytes / 2**20:.0f} MiB left; {advice}"
            )
        self._file = nameless_file()
        try:
            _reserve(self._file.descriptor, total)
        except OSError as error:
            raise InputError(f"data.workers: no room for {size} ({error.strerror}); {advice}") from error
        self.memory = mmap.mmap(self._file.descriptor, total)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the memory, which is mapped anew."""
        return {"layout": self.layout, "count": self.count, "_file": self._file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the memory of the process that sent it."""
        self.__dict__.update(state)
        self.memory = mmap.mmap(self._file.descriptor, self.layout.nbytes * self.count)

    def arrays(self, slot: int) -> SlotArrays:
        """Views of a slot."""
        return self.layout.arrays(self.memory, slot * self.layout.nbytes)


class LocalSlots:
    """The same in ordinary memory, for a loader without workers."""

    def __init__(self, layout: SlotLayout, count: int) -> None:
        self._slots = [layout.allocate() for _ in range(count)]

    def arrays(self, slot: int) -> SlotArrays:
        """Views of a slot."""
        return self._slots[slot]


def nameless_file() -> SharedFile:
    """Memory without a name; where the system has none, an unlinked temporary file."""
    if hasattr(os, "memfd_create"):
        return SharedFile(os.memfd_create("pretrain-loader", os.MFD_CLOEXEC))
    with tempfile.TemporaryFile() as file:
        return SharedFile(os.dup(file.fileno()))


def _reserve(file: int, size: int) -> None:
    """Take the memory now: where it is not there, writing to it later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
