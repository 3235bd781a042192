"""A copy of everything on each device; gradients are averaged while the backward pass runs."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.batch import Batch
from pretrain.config.schema import EngineConfig, OptimConfig
from pretrain.engines.base import StepResult
from pretrain.engines.single import SingleEngine
from pretrain.method.branch import SSLBranch, branch_output
from pretrain.method.outputs import BranchOutput

NEW_NAME = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # since torch 2.13
NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if NEW_NAME else "broadcast_buffers": False}


class FixedBuckets(DistributedDataParallel):
    """DDP whose gradients travel in the same buckets in every step.

    As it comes, DDP sends all in one bucket first and forms others after the first step. From four ranks on,
    where a number lies in its bucket decides the order of its sum: a run that was continued would differ in
    the last digit from one that was not. The buckets are filled from the last parameter to the first, about
    as the backward pass completes them.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        if not self.find_unused_parameters:  # else DDP keeps its first buckets
            self.reducer._push_all_rebuilt_params()
            self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        return parameters[::-1], sparse[::-1]


class DdpEngine(SingleEngine):
    """`SingleEngine` whose student is wrapped; all ranks hold the same weights at all times."""

    def __init__(
        self,
        student: SSLBranch,
        teacher: SSLBranch,
        method: nn.Module,
        optim: OptimConfig,
        engine: EngineConfig,
        device: torch.device,
    ) -> None:
        """As for `SingleEngine`; a process group must be running."""
        super().__init__(student, teacher, method, optim, engine, device)
        self.wrapped = FixedBuckets(
            student,
            **NO_BUFFERS,  # there are none that a forward changes
            gradient_as_bucket_view=True,
            find_unused_parameters=student.changes_heads,  # the head that is not in use gets no gradient
        )
        self.micro_batches, self.seen = engine.accumulation_steps, 0

    def student(self, batch: Batch) -> BranchOutput:
        """See `Engine`; gradients travel with the last micro-batch only."""
        self.seen += 1
        self.wrapped.require_backward_grad_sync = self.seen == self.micro_batches
        with self.autocast:
            return branch_output(self.wrapped(batch))

    def step(self) -> StepResult:
        """See `Engine`."""
        self.seen = 0
        return super().step()

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See `Engine`."""
        assert last == (self.seen == self.micro_batches), "a step has engine.accumulation_steps micro-batches"
        super().backward(loss, last)
