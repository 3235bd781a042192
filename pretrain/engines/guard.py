"""A bad step leaves no trace: decided on the device, without waiting for it.

A step is bad when its loss or a gradient norm is not finite, or, with `optim.spike_factor`, when its loss
exceeds that many times the running mean. The optimizer, the EMA and the centres then keep what they had,
through the flag of `check`; the host reads the counts when it logs.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretrain.distributed import all_max, all_sum, world_size

SPIKE_WARMUP = 50  # good steps before the running mean is trusted
MEAN_WEIGHT = 0.02  # of the newest loss in the running mean


class StepGuard(nn.Module):
    """Judges steps and counts the bad ones; its buffers belong to the checkpoint."""

    bad_steps: Tensor
    bad_run: Tensor
    good_steps: Tensor
    loss_mean: Tensor

    def __init__(self, spike_factor: float) -> None:
        super().__init__()
        self.spike_factor = spike_factor
        for name in ("bad_steps", "bad_run", "good_steps", "loss_mean"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def check(self, loss: Tensor, norms: Iterable[Tensor]) -> Tensor:
        """Whether the step is good: a bool scalar on the device, equal on all ranks.

        Args:
            loss: of the whole step, this rank's.
            norms: gradient norms per sub-module.
        """
        mean_loss = all_sum(loss.detach().float().clone()) / world_size()
        bad = ~torch.isfinite(torch.stack([mean_loss, *norms])).all()
        if self.spike_factor:
            excess = (mean_loss - self.loss_mean) > (self.spike_factor - 1) * self.loss_mean.abs()
            bad |= (self.good_steps >= SPIKE_WARMUP) & excess
        good = all_max(bad.float()) == 0
        self._count(good, mean_loss)
        return good

    def _count(self, good: Tensor, loss: Tensor) -> None:
        self.good_steps += good
        self.bad_steps += ~good
        self.bad_run.copy_(torch.where(good, 0.0, self.bad_run + 1))
        weight = (1 / self.good_steps.clamp(min=1)).clamp(min=MEAN_WEIGHT)
        self.loss_mean.copy_(torch.where(good, torch.lerp(self.loss_mean, loss, weight), self.loss_mean))
