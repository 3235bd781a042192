"""The answer of an experiment: do tasks need what tokens say, or just something plausible in their place."""

from dataclasses import dataclass
from typing import NamedTuple

from pretrain.analysis.uncertainty import Interval
from pretrain.registers.conditions import TokenSet, parse_condition
from pretrain.registers.results import Result
from pretrain.registers.tables import interval

PLAUSIBLE = (
    "mean",
    "noise",
    "shuffle",
    "bank",
)  # what the model may meet, unlike zeros and random directions
ALPHA = 0.05  # of all comparisons of a set together
WITHIN = 1.0  # points that count as nothing: the paper's


@dataclass(frozen=True)
class Finding:
    """Of one set of tokens."""

    tokens: str
    verdict: str  # needed, not needed, undecided
    line: str


class _Loss(NamedTuple):
    task: str
    mode: str
    points: Interval
    p_value: float

    def __str__(self) -> str:
        return f"{self.mode} {self.points.mean:+.1f} points ({interval(self.points)}) at {self.task}"


def findings(result: Result) -> list[Finding]:
    """One for each set of tokens that has a plausible replacement; patches are a control and have none."""
    sets = dict.fromkeys(str(tokens) for tokens in _sets(result) if tokens.kind != "patch")
    found = (_finding(tokens, _losses(result, tokens)) for tokens in sets)
    return [one for one in found if one is not None]


def _sets(result: Result) -> list[TokenSet]:
    return [parse_condition(name).tokens for name in result.effects]


def _losses(result: Result, tokens: str) -> list[_Loss]:
    return [
        _Loss(task, str(parse_condition(name).mode), own.difference, own.p_value or 0.0)
        for task, by_condition in result.scores.items()
        for name, own in by_condition.items()
        if own.difference is not None and str(parse_condition(name).tokens) == tokens
    ]


def _finding(tokens: str, losses: list[_Loss]) -> Finding | None:
    """By intervals: a mean within a point is no evidence that nothing is lost.

    One loss beyond a point is enough for `needed`, so its p-value is held against the number of comparisons
    (Bonferroni); `not needed` asks all intervals to lie within, which many comparisons make harder.
    """
    plausible = [loss for loss in losses if loss.mode in PLAUSIBLE]
    if not plausible:
        return None
    worst = min(plausible, key=lambda loss: loss.points.mean)
    limit = ALPHA / len(plausible)
    lost = [loss for loss in plausible if loss.points.high < -WITHIN and loss.p_value < limit]
    if all(loss.points.low >= -WITHIN and loss.points.high <= WITHIN for loss in plausible):
        verdict, why = "not needed", f"plausible replacements change all tasks by less than {WITHIN:g} point"
    elif lost:
        worst = min(lost, key=lambda loss: loss.points.mean)
        verdict, why = "needed", f"{len(lost)} of {len(plausible)} scores lose more than {WITHIN:g} point"
    else:
        verdict, why = "undecided", f"intervals reach beyond {WITHIN:g} point; take more images"
    return Finding(tokens, verdict, f"content of {tokens} is {verdict}: {why}; worst {worst}{_zero(losses)}")


def _zero(losses: list[_Loss]) -> str:
    """What zeros do beside that."""
    zeros = [loss for loss in losses if loss.mode == "zero"]
    if not zeros:
        return ""
    worst = min(zeros, key=lambda loss: loss.points.mean)
    return f"; zeros at worst {str(worst).removeprefix('zero ')}"
