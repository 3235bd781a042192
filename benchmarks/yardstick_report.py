"""What the yardstick found: a table, a drawing of the curves, and every figure as JSON."""

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pretrain.revision import code_revision

Score = tuple[float, float]  # k-NN accuracy in percent of the CLS token and of the mean patch token
KINDS = ("CLS", "mean patch")

# The original DINOv2 trainer in the same setting, seed 0: step -> percent.
ORIGINAL: dict[int, Score] = {0: (41.8, 46.4), 100: (64.0, 53.7), 200: (75.8, 62.5), 300: (77.1, 64.2)}
MARGIN = 2.0  # points that the mean over the seeds may stay below the original after its last step


@dataclass(frozen=True)
class Curve:
    """What one run has logged."""

    scores: dict[int, Score]  # by step
    images_per_s: list[float]  # of each log line
    warnings: int = 0  # lines in which the run said that something is wrong

    @property
    def last(self) -> Score:
        """The scores after the last step."""
        return self.scores[max(self.scores)]


@dataclass(frozen=True)
class Outcome:
    """The runs of every seed, and what they were."""

    data: str
    recipes: tuple[str, str]  # of configs/: with trainable heads, with randomized ones
    patch_size: int  # pixels
    overrides: list[str]
    steps: int  # with MLP heads
    rmlp_steps: int  # with randomized heads after that
    first: dict[int, Curve]  # seed -> MLP heads
    second: dict[int, Curve]  # seed -> randomized heads, from the teacher of the first; empty without
    as_original: bool  # whether the original trainer was measured in this setting

    def original(self) -> dict[int, Score]:
        """The original trainer's curve, empty where it was not measured."""
        return ORIGINAL if self.as_original else {}


def warnings(outcome: Outcome) -> int:
    """Warnings of all runs together: a healthy run has none."""
    return sum(curve.warnings for curve in [*outcome.first.values(), *outcome.second.values()])


def mean_score(scores: Sequence[Score]) -> Score:
    """Mean over the seeds."""
    cls, patch = zip(*scores, strict=True)
    return statistics.fmean(cls), statistics.fmean(patch)


def mean_curve(curves: dict[int, Curve]) -> dict[int, Score]:
    """Mean over the seeds at every step that all of them have."""
    steps = set.intersection(*(set(curve.scores) for curve in curves.values()))
    return {step: mean_score([curve.scores[step] for curve in curves.values()]) for step in sorted(steps)}


def shortfall(outcome: Outcome) -> Score | None:
    """Points by which the means stay below the original's last scores (negative: above); None without one."""
    original = outcome.original()
    if not original:
        return None
    step = max(original)
    ours, theirs = mean_curve(outcome.first)[step], original[step]
    return theirs[0] - ours[0], theirs[1] - ours[1]


def passed(outcome: Outcome) -> bool:
    """Whether both means are at least the original's minus the margin; true where nothing is known."""
    short = shortfall(outcome)
    return short is None or max(short) <= MARGIN


def markdown(outcome: Outcome, chart: str = "") -> str:
    """The report; `chart` is the file name of a drawing to show in it."""
    changed = f", changed: `{' '.join(outcome.overrides)}`" if outcome.overrides else ""
    lines = [
        f"# Yardstick: {outcome.data}, {outcome.steps} steps, patch {outcome.patch_size}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}. {machine()}.",
        f"Setting: `configs/{outcome.recipes[0]}`, then `configs/{outcome.recipes[1]}`{changed}.",
        "Weighted k-NN (k 20) accuracy of the teacher on the held-out images, percent.",
        "",
        *_table(outcome),
        "",
        *_verdict(outcome),
        f"Warnings that the runs printed: {warnings(outcome)}.",
        "",
        *([f"![k-NN accuracy by step]({chart})", ""] if chart else []),
    ]
    return "\n".join(lines)


def machine() -> str:
    """CPU, cores, torch and code: what the seconds depend on."""
    revision, *modified = code_revision(Path(__file__).parents[1] / "pretrain").split(" (")
    code = f"{revision[:12]} (modified)" if modified else revision[:12]
    return f"{_cpu()}, {os.cpu_count()} cores, torch {torch.__version__}, code {code}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU of unknown model")


def _table(outcome: Outcome) -> Iterator[str]:
    """Rows by step; for each kind of token the seeds, the mean of several, and the original."""
    seeds, original = list(outcome.first), outcome.original()
    several = len(seeds) > 1
    columns = [f"seed {seed}" for seed in seeds] + ["mean"] * several + ["original"] * bool(original)
    names = [f"{kind}, {column}" for kind in KINDS for column in columns]
    yield f"| after | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for step, mean in mean_curve(outcome.first).items():
        scores = [outcome.first[seed].scores[step] for seed in seeds] + [mean] * several
        yield _row(f"{step} steps", scores, [original.get(step)] if original else [])
    if outcome.second:
        scores = [outcome.second[seed].last for seed in seeds]
        scores += [mean_score(scores)] * several
        yield _row(f"{outcome.rmlp_steps} more, randomized heads", scores, [None] if original else [])


def _row(name: str, scores: list[Score], original: list[Score | None]) -> str:
    cells = [f"{s[kind]:.1f}" if s else "" for kind in range(2) for s in [*scores, *original]]
    return f"| {name} | {' | '.join(cells)} |"


def _verdict(outcome: Outcome) -> Iterator[str]:
    short = shortfall(outcome)
    if short is None:
        return
    for kind, points in zip(KINDS, short, strict=True):
        word = "reached" if points <= MARGIN else "NOT reached"
        yield f"{kind}: {-points:+.1f} points against the original; at least {-MARGIN:+.0f} asked: {word}."
        yield ""


def figures(outcome: Outcome) -> dict[str, Any]:
    """Every figure, units in the names."""
    short = shortfall(outcome)
    return {
        "benchmark": "yardstick",
        "data": outcome.data,
        "recipes": outcome.recipes,
        "patch_size_px": outcome.patch_size,
        "overrides": outcome.overrides,
        "seeds": list(outcome.first),
        "steps": outcome.steps,
        "rmlp_steps": outcome.rmlp_steps,
        "mlp_by_step_cls_and_patch_mean_percent": {s: _rounded(c.scores) for s, c in outcome.first.items()},
        "mlp_mean_by_step_cls_and_patch_mean_percent": _rounded(mean_curve(outcome.first)),
        "rmlp_cls_and_patch_mean_percent": _rounded({s: c.last for s, c in outcome.second.items()}),
        "original_by_step_cls_and_patch_mean_percent": outcome.original(),
        "warnings": warnings(outcome),
        "mlp_median_images_per_s": {s: _speed(c) for s, c in outcome.first.items()},
        "rmlp_median_images_per_s": {s: _speed(c) for s, c in outcome.second.items()},
        "below_original_cls_and_patch_mean_points": short and [round(points, 2) for points in short],
        "margin_points": MARGIN,
        "passed": None if short is None else passed(outcome),
        "machine": machine(),
    }


def _rounded(scores: dict[int, Score]) -> dict[int, Score]:
    return {key: (round(cls, 2), round(patch, 2)) for key, (cls, patch) in scores.items()}


def _speed(curve: Curve) -> float | None:
    return round(statistics.median(curve.images_per_s), 1) if curve.images_per_s else None


# -- the drawing, written by hand so that no plotting package is needed

WIDTH, HEIGHT, LEFT, TOP = 340, 220, 44, 34  # pixels of one panel and of the margins before it
SEED, MEAN = 'stroke="#b9c6d6"', 'stroke="#1f5fa8" stroke-width="2.5"'
REFERENCE = 'stroke="#d9722e" stroke-width="2" stroke-dasharray="6 4"'
RANDOMIZED = f'{MEAN} stroke-dasharray="2 3"'


def svg(outcome: Outcome) -> str:
    """Accuracy by step, a panel for each kind of token."""
    panels = "".join(_panel(outcome, kind) for kind in range(2))
    size = f'width="{2 * (WIDTH + LEFT) + 20}" height="{HEIGHT + TOP + 46}"'
    style = "font-family:sans-serif;font-size:11px;fill:none;stroke-linejoin:round"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{panels}</svg>\n'
    )


def _panel(outcome: Outcome, kind: int) -> str:
    total = outcome.steps + (outcome.rmlp_steps if outcome.second else 0)
    first = mean_curve(outcome.first)
    lines = [_line(curve.scores, kind, total, SEED) for curve in outcome.first.values()]
    lines.append(_line(first, kind, total, MEAN))
    if outcome.original():
        lines.append(_line(outcome.original(), kind, total, REFERENCE))
    if outcome.second:
        end = mean_score([curve.last for curve in outcome.second.values()])
        lines.append(_line({outcome.steps: first[outcome.steps], total: end}, kind, total, RANDOMIZED))
    left = LEFT + kind * (WIDTH + LEFT)
    return f'<g transform="translate({left} {TOP})">\n{_axes(kind, total)}{"".join(lines)}</g>\n'


def _line(scores: dict[int, Score], kind: int, total: int, style: str) -> str:
    """The scores of one kind of token over `total` steps of width."""
    points = " ".join(
        f"{WIDTH * step / total:.1f},{HEIGHT * (1 - score[kind] / 100):.1f}"
        for step, score in sorted(scores.items())
    )
    return f'<polyline points="{points}" {style}/>\n'


def _axes(kind: int, total: int) -> str:
    text = [f'<text x="0" y="-14" fill="#222" font-weight="bold">{KINDS[kind]}: k-NN accuracy, %</text>']
    for percent in range(0, 101, 20):
        y = HEIGHT * (1 - percent / 100)
        text.append(f'<path d="M0 {y:.0f}H{WIDTH}" stroke="#e4e4e4"/>')
        text.append(f'<text x="-6" y="{y + 4:.0f}" text-anchor="end" fill="#555">{percent}</text>')
    for part in range(5):
        x, step = WIDTH * part / 4, total * part // 4
        text.append(f'<text x="{x:.0f}" y="{HEIGHT + 16}" text-anchor="middle" fill="#555">{step}</text>')
    key = "by optimizer step; seeds pale, mean blue, original trainer dashed, randomized heads dotted"
    text.append(f'<text x="0" y="{HEIGHT + 34}" fill="#555">{"" if kind else key}</text>')
    return "\n".join(text) + "\n"
