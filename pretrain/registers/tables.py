"""What the tool prints of an experiment, as tables of text; the report shows the same."""

import math
from collections.abc import Mapping, Sequence

from pretrain.analysis.page import Table
from pretrain.analysis.uncertainty import Interval
from pretrain.registers.looks import FULL
from pretrain.registers.results import Effect, Result, Score

ALPHA = 0.05  # below it a p-value gets a star, each for itself


def summary_table(result: Result) -> Table:
    """A row per condition, a column per task: what it lost in points, with * where p is below 5 %."""
    names = [FULL, *result.effects]
    columns = [[_summary(by.get(name)) for name in names] for by in result.scores.values()]
    rows = [[name, *row] for name, row in zip(names, zip(*columns, strict=True), strict=True)]
    return Table(["%, then points", *result.scores], rows)


def _summary(own: Score | None) -> str:
    if own is None:
        return ""
    if own.difference is None or own.p_value is None:
        return f"{own.score.mean:.1f}"
    return f"{own.difference.mean:+.1f}{'*' if own.p_value < ALPHA else ' '}"


def task_table(task: str, result: Result) -> Table:
    """A row per condition: score, what it lost, how sure that is, how odd the replacement was."""
    headings = [task, "score %", "to full", "95 % interval", "p", "ln norm ratio", "distance"]
    return Table(headings, [_task_row(name, own, result) for name, own in result.scores[task].items()])


def _task_row(name: str, own: Score, result: Result) -> list[str]:
    if own.difference is None or own.p_value is None:
        return [name, f"{own.score.mean:.1f}", "", interval(own.score, ""), "", "", ""]
    lost = own.difference
    odd = [f"{mean(values):.2f}" for values in result.effects[name].oddness.values()]
    return [name, f"{own.score.mean:.1f}", f"{lost.mean:+.1f}", interval(lost), f"{own.p_value:.4f}", *odd]


def interval(found: Interval, sign: str = "+") -> str:
    """Both ends of an interval."""
    return f"{found.low:{sign}.1f} to {found.high:{sign}.1f}"


def effect_table(result: Result) -> Table:
    """A row per condition: what patches and attention show of it."""
    headings = ["condition", "patch cosine", "p5", "p50", "ln norm ratio", "distance"]
    attention = any(effect.attention for effect in result.effects.values())
    if attention:
        headings += ["JS last", "JS most", "cls on it %", "patches on it %"]
    rows = [[name, *_effect_row(effect)] for name, effect in result.effects.items()]
    return Table(headings, rows)


def _effect_row(effect: Effect) -> list[str]:
    row = [f"{value:.4f}" for value in (effect.cosine_mean, effect.cosine_p5, effect.cosine_p50)]
    row += [f"{mean(values):.2f}" for values in effect.oddness.values()]
    if effect.attention:
        apart = effect.attention["divergence"]
        row += [f"{apart[-1]:.4f}", f"{max(apart):.4f}"]
        for who in ("cls", "patch"):
            before, after = (effect.attention[f"{who}_{when}"][-1] for when in ("full", "ablated"))
            row.append(f"{100 * before:.0f} to {100 * after:.0f}")
    return row


def block_table(effects: Mapping[str, Effect], figure: str) -> Table:
    """A figure of attention by block, a column per condition."""
    curves = {name: effect.attention[figure] for name, effect in effects.items()}
    rows = enumerate(zip(*curves.values(), strict=True))
    return Table(["block", *curves], [[f"{block}", *(f"{v:.4f}" for v in row)] for block, row in rows])


def mean(values: Sequence[float]) -> float:
    """Of blocks; -inf where one is."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else -math.inf
