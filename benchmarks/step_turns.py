"""Sides of a benchmark of the training step take turns in one process, each part of a step timed."""

import random
from collections.abc import Sequence
from statistics import median
from typing import Protocol

import torch
from step_baseline import Mark
from step_cost import durations, now
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config.schema import Config
from pretrain.optim.schedules import Schedules, StepValues


class Side(Protocol):
    """What can do a training step."""

    def step(self, batch: Batch, step: int, values: StepValues, mark: Mark) -> dict[str, Tensor]:
        """Losses and gradient norms; `mark` is told of the end of each part."""


class Runner:
    """One side: its count of steps, their losses, the times of its turns."""

    def __init__(self, side: Side, cfg: Config, device: torch.device) -> None:
        self.side, self.schedules, self.device = side, Schedules(cfg), device
        self.losses: list[dict[str, float]] = []
        self.turns: list[dict[str, float]] = []  # seconds a step by part

    def turn(self, batches: Sequence[Batch]) -> None:
        """A step on every batch."""
        names, points, logged = [], [now(self.device)], []

        def mark(name: str) -> None:
            names.append(name)
            points.append(now(self.device))

        for step, batch in enumerate(batches, start=len(self.losses)):
            logged.append(self.side.step(batch, step, self.schedules.at(step), mark))
        parts = dict.fromkeys(names, 0.0)
        for name, seconds in zip(names, durations(points), strict=True):
            parts[name] += seconds / len(batches)
        self.turns.append(parts)
        self.losses += [{name: float(value) for name, value in values.items()} for values in logged]

    def seconds(self) -> list[float]:
        """A step's time in each turn after the first."""
        return [sum(parts.values()) for parts in self.turns[1:]]

    def parts(self) -> dict[str, float]:
        """A step's median time in each part."""
        return {name: median([turn[name] for turn in self.turns[1:]]) for name in self.turns[0]}


def take_turns(runners: Sequence[Runner], batches: Sequence[Batch], repeats: int) -> None:
    """A turn of each side to warm up, then those that count, in random order."""
    order = random.Random(0)
    for _ in range(1 + repeats):
        for runner in order.sample(runners, len(runners)):
            runner.turn(batches)
