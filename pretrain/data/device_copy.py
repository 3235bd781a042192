"""Micro-batches from their slots to the device, beside the computation where the device can do both.

On a CPU a batch is a view of its slot, which is free again after the step. On a GPU the slots are page-locked
where they lie, copied on a stream of their own, and free as soon as the copy is done.
"""

import warnings
from collections import deque
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from pretrain.batch import Batch
from pretrain.data.device_augment import augment_on_device
from pretrain.data.slots import LocalSlots, SharedSlots, SlotArrays


class _Copy(NamedTuple):
    """A slot that is being copied."""

    slot: int
    finished: torch.cuda.Event
    source: Batch  # kept alive until then


class DeviceCopier:
    """Brings batches to one device."""

    def __init__(self, device: torch.device, slots: SharedSlots | LocalSlots) -> None:
        """Page-lock the slots where the device needs it."""
        self.device = device
        self.overlaps = device.type == "cuda"
        self._in_use: list[int] = []  # slots whose views the step works on
        self._copies: deque[_Copy] = deque()
        self._locked = 0
        if self.overlaps:
            self._stream = torch.cuda.Stream(device)
            if isinstance(slots, SharedSlots):
                self._locked = _page_lock(slots)

    def send(self, batch: Batch, slot: int, arrays: SlotArrays) -> Batch:
        """Start bringing a batch to the device and, where the device augments, finish its crops there."""
        if not self.overlaps:
            self._in_use.append(slot)
            return _augmented(batch, arrays)
        with torch.cuda.stream(self._stream):
            there = _augmented(batch.to(self.device, non_blocking=True), arrays)
            finished = torch.cuda.Event()
            finished.record(self._stream)
        self._copies.append(_Copy(slot, finished, batch))
        return there

    def arrived(self, batch: Batch) -> Batch:
        """Let the computation that follows wait for the copy."""
        if self.overlaps:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            batch.record_stream(current)
        return batch

    def release(self, wait: bool = False) -> list[int]:
        """Slots that can be written to again; with `wait` at least one where a copy is under way."""
        released, self._in_use = self._in_use, []
        while self._copies and (wait or self._copies[0].finished.query()):
            copy = self._copies.popleft()
            copy.finished.synchronize()
            released.append(copy.slot)
            wait = False
        return released

    def close(self) -> None:
        """Give the memory back to the system."""
        for copy in self._copies:
            copy.finished.synchronize()
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._locked)


def _augmented(batch: Batch, arrays: SlotArrays) -> Batch:
    """The batch with what is left to do to its crops done, where it is."""
    if arrays.global_params is None or arrays.local_params is None:
        return batch
    width = arrays.global_params.shape[-1]
    return replace(
        batch,
        global_crops=augment_on_device(batch.global_crops, arrays.global_params.reshape(-1, width)),
        local_crops=augment_on_device(batch.local_crops, arrays.local_params.reshape(-1, width)),
    )


def _page_lock(slots: SharedSlots) -> int:
    """The address of the locked memory, 0 where the system refuses: copies then wait for the host."""
    memory = np.frombuffer(slots.memory, np.uint8)
    if int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) != 0:
        warnings.warn(
            "the slots of the loader cannot be page-locked; copies to the GPU are slower", stacklevel=2
        )
        return 0
    return int(memory.ctypes.data)
