"""Linear probing of frozen features as DINOv2 does it: many learning rates side by side, the best one chosen.

Chosen on a part of the training images that no probe is fitted on; the best on the test images is told too,
as an oracle: a score that was looked up, not earned.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.analysis.last_blocks import BLOCKS, LastBlocks
from pretrain.errors import InputError
from pretrain.seeding import numpy_stream, torch_stream

# DINOv2, eval/linear.py: for 256 images a batch
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOMENTUM = 0.9
INIT_STD = 0.01  # of the weights


@dataclass(frozen=True)
class ProbeSettings:
    """How the probes are fitted."""

    rates: Sequence[float] = RATES
    epochs: int = 10
    least_steps: int = 1000  # where the epochs have fewer
    batch_size: int = 1024  # DINOv2: 128 on each of 8 devices
    held_out: float = 0.1  # share of each class's training images that choose
    seed: int = 0


class Setting(NamedTuple):
    """One probe of the grid."""

    blocks: int  # whose class tokens it sees, the last ones
    mean_patch: bool  # whether it sees the mean patch too
    rate: float

    def __str__(self) -> str:
        """For tables."""
        features = f"{self.blocks} block{'s' if self.blocks > 1 else ''}"
        return f"{features}{' + mean patch' if self.mean_patch else ''}, lr {self.rate:g}"


@dataclass(frozen=True)
class GridPoint:
    """A probe and what it is worth, in percent."""

    setting: Setting
    validation: float
    test: float


@dataclass(frozen=True)
class LinearScores:
    """The whole grid."""

    grid: list[GridPoint]
    chosen: GridPoint  # the best on the held-out training images; of equals the first
    oracle: GridPoint  # the best on the test images
    correct: Tensor  # (m,) bool on the CPU: test images that the chosen probe gets right


class Probes(NamedTuple):
    """L linear classifiers of the same features."""

    weight: Tensor  # (W, L, C)
    bias: Tensor  # (L, C)

    def correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Which rows (m, W) each gets right: (m, L) bool; a probe that is not finite gets nothing right."""
        parts = []
        for rows, classes in zip(features.split(4096), labels.split(4096), strict=True):
            scores = (rows @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias
            finite = scores.isfinite().all(dim=-1)
            parts.append((scores.argmax(dim=-1) == classes[:, None]) & finite)
        return torch.cat(parts)


def linear_probe(
    train: LastBlocks,
    test: LastBlocks,
    settings: ProbeSettings,
    advance: Callable[[int], None] = lambda _: None,
) -> LinearScores:
    """Fit all probes on one part of the training images, choose on the other, score on the test images.

    Args:
        train: features of labelled images.
        test: of others, on the same device.
        settings: of the fit.
        advance: told of feature sets, four in all.

    Raises:
        InputError: fewer than two classes, or no class has a second image to hold out.
    """
    held_out = held_out_rows(train.labels.cpu(), settings.held_out, settings.seed).to(train.labels.device)
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    grid: list[GridPoint] = []
    correct: list[Tensor] = []
    for blocks, mean_patch in feature_sets(train.cls.shape[1]):
        rows, others = (part.features(blocks, mean_patch) for part in (train, test))
        probes = fit_probes(rows[~held_out], train.labels[~held_out], classes, settings)
        valid = percent(probes.correct(rows[held_out], train.labels[held_out]))
        right = probes.correct(others, test.labels)
        for rate, validation, score in zip(settings.rates, valid, percent(right), strict=True):
            grid.append(GridPoint(Setting(blocks, mean_patch, rate), validation, score))
        correct += list(right.T.cpu())
        advance(1)
    chosen = max(range(len(grid)), key=lambda index: grid[index].validation)
    oracle = max(grid, key=lambda point: point.test)
    return LinearScores(grid, grid[chosen], oracle, correct[chosen])


def feature_sets(blocks: int) -> list[tuple[int, bool]]:
    """Last block or several, without and with the mean patch; of a model with `blocks` blocks at hand."""
    return [(number, mean) for number in sorted({1, min(BLOCKS, blocks)}) for mean in (False, True)]


def percent(correct: Tensor) -> list[float]:
    """Accuracy of each column of (m, L)."""
    values: list[float] = (100 * correct.double().mean(dim=0)).tolist()
    return values


def held_out_rows(labels: Tensor, share: float, seed: int) -> Tensor:
    """A share of each class, drawn, at least one image and never all: (n,) bool.

    Raises:
        InputError: fewer than two classes, or no class has two images.
    """
    found, places = labels.unique(), numpy_stream(seed, "linear probe", "held out").permutation(len(labels))
    held = torch.zeros(len(labels), dtype=torch.bool)
    shuffled = torch.from_numpy(places)
    for label in found:
        own = shuffled[labels[shuffled] == label]
        held[own[: min(max(1, round(share * len(own))), len(own) - 1)]] = True
    if len(found) < 2 or not held.any():
        raise InputError("--train: linear probing needs two or more classes, with several images in each")
    return held


def fit_probes(features: Tensor, labels: Tensor, classes: int, settings: ProbeSettings) -> Probes:
    """SGD with momentum and cosine decay to 0 on cross-entropy, from the same small weights for all rates.

    All probes see the same batches, so that one product serves them all; their gradients do not mix.

    Args:
        features: (n, W) fp32.
        labels: (n,) int64 below `classes`.
        classes: C.
        settings: rates are for 256 images a batch and scaled to the batch; it is at most n.
    """
    device, number = features.device, len(features)
    batch = min(settings.batch_size, number)
    per_epoch = number // batch
    steps = max(settings.least_steps, settings.epochs * per_epoch)
    rates = torch.tensor(settings.rates, device=device).view(-1, 1) * batch / 256  # (L, 1)
    generator = torch_stream(settings.seed, "linear probe", "weights")
    drawn = INIT_STD * torch.randn(features.shape[1], 1, classes, generator=generator)
    weight = drawn.to(device).repeat(1, len(rates), 1)
    bias = torch.zeros(len(rates), classes, device=device)
    pushes = torch.zeros_like(weight), torch.zeros_like(bias)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if step % per_epoch == 0:
            order = _order(settings.seed, step // per_epoch, number).to(device)
        rows = order[step % per_epoch * batch :][:batch]
        lr = rates * 0.5 * (1 + math.cos(math.pi * step / steps))
        _step(Probes(weight, bias), features[rows], labels[rows], pushes, lr)
    return Probes(weight, bias)


def _order(seed: int, epoch: int, number: int) -> Tensor:
    return torch.randperm(number, generator=torch_stream(seed, "linear probe", "order", epoch))


def _step(probes: Probes, rows: Tensor, labels: Tensor, pushes: tuple[Tensor, Tensor], lr: Tensor) -> None:
    """One step of all probes in place; the gradient of cross-entropy is softmax minus target."""
    scores = (rows @ probes.weight.flatten(1)).unflatten(1, probes.bias.shape) + probes.bias  # (B, L, C)
    slope = scores.softmax(dim=-1)
    slope[torch.arange(len(rows), device=rows.device), :, labels] -= 1
    slope /= len(rows)
    gradients = (rows.T @ slope.flatten(1)).view_as(probes.weight), slope.sum(dim=0)
    for value, push, gradient in zip(probes, pushes, gradients, strict=True):
        push.mul_(MOMENTUM).add_(gradient)
        value.sub_(lr * push)
