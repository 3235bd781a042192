"""Every value that changes over a run, as a pure function of the step (0-based)."""

import math
from dataclasses import dataclass

from pretrain.config.derived import peak_lr
from pretrain.config.schema import Config


@dataclass(frozen=True)
class StepValues:
    """The scheduled values of one step."""

    lr: float
    last_layer_lr: float  # of the prototypes: 0 while they are frozen
    backbone_lr: float  # likewise
    weight_decay: float
    momentum: float  # of the teacher's EMA
    teacher_temp: float


def linear(step: int, start: float, end: float, steps: int) -> float:
    """From start (step 0) to end (step `steps` - 1), both reached; then end."""
    if step >= steps:
        return end
    return start if steps == 1 else start + (end - start) * step / (steps - 1)


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """Half a cosine from start (step 0) that reaches end at `steps`; then end."""
    if step >= steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


class Schedules:
    """DINOv2's schedules: warm-up and cosine for lr, cosine for weight decay and momentum, linear temp."""

    def __init__(self, cfg: Config) -> None:
        self.steps = cfg.run.steps
        self.optim = cfg.optim
        self.teacher = cfg.teacher
        self.peak_lr = peak_lr(cfg.optim)

    def at(self, step: int) -> StepValues:
        """Values of a step."""
        optim, teacher = self.optim, self.teacher
        lr = self._lr(step)
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if step < optim.freeze_last_layer_steps else lr,
            backbone_lr=0.0 if step < optim.freeze_backbone_steps else lr,
            weight_decay=cosine(step, optim.weight_decay, optim.weight_decay_end, self.steps),
            momentum=cosine(step, teacher.momentum, teacher.final_momentum, self.steps),
            teacher_temp=linear(step, teacher.warmup_temp, teacher.temp, teacher.temp_warmup_steps),
        )

    def _lr(self, step: int) -> float:
        warmup = self.optim.warmup_steps
        if step < warmup:
            return linear(step, 0.0, self.peak_lr, warmup)
        return cosine(step - warmup, self.peak_lr, self.optim.min_lr, self.steps - warmup)
