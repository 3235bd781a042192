"""What an experiment finds, condition by condition, with how sure each difference is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pretrain.analysis.uncertainty import Interval, bootstrap, bootstrap_difference, permutation_test
from pretrain.registers.looks import FULL


class Paired(NamedTuple):
    """Scores in percent, image by image; NaN where an image cannot be scored."""

    own: Tensor  # (n,)
    full: Tensor  # (n,) of the full model, asked for the same


Scores = dict[str, dict[str, Paired]]  # by task, then by condition, the full model first


@dataclass(frozen=True)
class Score:
    """Of one condition at one task, in percent."""

    score: Interval  # over images
    difference: Interval | None  # to the full model, in points, paired by image; None of itself
    p_value: float | None  # of no difference; likewise


@dataclass(frozen=True)
class Effect:
    """What one condition does inside of the model."""

    cosine_mean: float  # of patches with the full model's, after the final norm
    cosine_p5: float
    cosine_p50: float
    attention: dict[str, list[float]]  # by block; see `AttentionShift`; empty where none was compared
    oddness: dict[str, list[float]]  # by replaced block; see `Oddness`


@dataclass(frozen=True)
class Result:
    """All of an experiment."""

    images: int
    effective_rank: float  # mean over images, of the full model's patches
    effects: dict[str, Effect]  # by condition
    scores: dict[str, dict[str, Score]]  # by task, then by condition, the full model first


def compared(scores: Scores, seed: int) -> dict[str, dict[str, Score]]:
    """Scores with intervals and p-values."""
    return {task: _compared(by_condition, seed) for task, by_condition in scores.items()}


def _compared(values: Mapping[str, Paired], seed: int) -> dict[str, Score]:
    """Images that cannot be scored are left out; a condition without any is."""
    found = {}
    for name, pair in values.items():
        own, full = (scores.double().numpy() for scores in pair)
        scored, both = np.isfinite(own), np.isfinite(own) & np.isfinite(full)
        if not both.any():
            continue
        score, paired = bootstrap(own[scored], seed), (own[both], full[both], seed)
        whole = name == FULL
        difference = None if whole else bootstrap_difference(*paired)
        found[name] = Score(score, difference, None if whole else permutation_test(*paired))
    return found
