"""Scores of frozen backbones as tables, figures and a page that stands alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.analysis import plots
from pretrain.analysis.alignment import MASS, mass
from pretrain.analysis.evaluation import Score, differences
from pretrain.analysis.foreground import SMALLEST_GRID, foreground_colours
from pretrain.analysis.linear_probe import GridPoint, LinearScores
from pretrain.analysis.marks import marked
from pretrain.analysis.page import Page, write_figures
from pretrain.analysis.segmentation import IGNORED
from pretrain.analysis.sheet import attention_heat
from pretrain.analysis.uncertainty import LEVEL
from pretrain.analysis.view import View

SHOWN = 6  # images in pictures
HEADLINES = ("k-NN", "linear", "retrieval", "segmentation")  # groups whose first score stands on top
QUESTION = (
    "What are the features of this backbone worth, frozen? Classes by nearest neighbours, by linear "
    "probes and by retrieval; regions by a linear map of patches; and whether attention follows what "
    "images show."
)
RESULTS = (
    f"In brackets: {100 * LEVEL:g} % bootstrap intervals over test images. They say "
    "how much a score would move with other images of the same kind, not with other weights, seeds or "
    "training images."
)
CAVEATS = (
    "Linear probes see features extracted once from centre crops; DINOv2 draws random crops and flips "
    "at every step, so scores differ a little. The probe is the best of its grid on held-out training "
    "images and is not fitted again on all of them. The oracle is chosen on the test images "
    "themselves: it bounds what another choice could have brought and is no result.",
    "k-NN, retrieval and probes use the class token after the final norm. A class that only the test "
    "images have counts as wrong.",
    "Attention consistency: Pearson correlation of class-token attention in the last block, mean of "
    "the heads, with that of the moved image, moved back by whole patches. 1 = it moves with the "
    "image; `other image` is what unrelated images share, such as a liking for the middle. Models "
    "trained upright have never seen rotations.",
    f"Alignment: class 0 is background, {IGNORED} does not count, all else is object. IoU of "
    f"attention: the patches that hold {100 * MASS:g} % of it, as DINO segments. Pointing game: "
    "whether the highest patch lies on an object. Patches are coarse: even perfect ones lose IoU at "
    "outlines.",
)


@dataclass(frozen=True)
class Subject:
    """One of the models."""

    name: str
    scores: list[Score]
    linear: LinearScores
    seen: View  # of the images, masked ones where there are masks


@dataclass(frozen=True)
class Report:
    """What a report tells beside the figures."""

    subjects: Sequence[Subject]
    pixels: Tensor  # (n, 3, s, s) from 0 to 1: the images of the views
    masks: Tensor | None  # (n, S, S) classes
    facts: Mapping[str, str]  # of the protocol


def score_rows(subjects: Sequence[Subject]) -> list[list[str]]:
    """A row for each score, a column for each model after group and name."""
    tables = [{(score.group, score.name): score for score in subject.scores} for subject in subjects]
    names = dict.fromkeys(name for table in tables for name in table)
    return [[*name, *(shown(table[name]) if name in table else "-" for table in tables)] for name in names]


def shown(score: Score) -> str:
    """A score in words, with its interval where it has one."""
    unit, digits = (" %", 1) if score.percent else ("", 2)
    value = f"{score.value:.{digits}f}{unit}"
    return value if score.low == score.high else f"{value} [{score.low:.{digits}f}, {score.high:.{digits}f}]"


def document(report: Report) -> dict[str, Any]:
    """All figures as plain values, for JSON."""
    models = []
    for subject in report.subjects:
        scores = [{k: v for k, v in vars(score).items() if k != "values"} for score in subject.scores]
        linear = subject.linear
        probes = {
            "chosen": _point(linear.chosen),
            "oracle": _point(linear.oracle),
            "grid": [_point(point) for point in linear.grid],
        }
        models.append({"name": subject.name, "scores": scores, "linear": probes})
    return {"protocol": dict(report.facts), "models": models}


def _point(point: GridPoint) -> dict[str, Any]:
    return {**point.setting._asdict(), "validation": point.validation, "test": point.test}


def write_report(path: Path, report: Report) -> None:
    """Write the page, and the figures beside it.

    Raises:
        InputError: a file cannot be written.
    """
    page = Page("Evaluation of " + ", ".join(subject.name for subject in report.subjects), QUESTION)
    names = [subject.name for subject in report.subjects]
    for subject in report.subjects:
        page.verdict(summary(subject))
    page.section("Results", RESULTS)
    page.table(
        ["score", *names], [[f"{group}: {name}", *row] for group, name, *row in score_rows(report.subjects)]
    )
    if len(names) > 1:
        _against(page, report.subjects)
    for subject in report.subjects:
        _grid(page, subject)
    _pictures(page, report)
    page.section("Protocol")
    page.facts(report.facts)
    page.section("How to read this", *CAVEATS)
    page.write(path)
    write_figures(path, document(report))


def summary(subject: Subject) -> str:
    """One line for those who read no further."""
    firsts = {score.group: score for score in reversed(subject.scores) if score.group in HEADLINES}
    told = [
        f"{group} ({firsts[group].name}) {shown(firsts[group])}" for group in HEADLINES if group in firsts
    ]
    return f"{subject.name}: {', '.join(told)}"


def _against(page: Page, subjects: Sequence[Subject]) -> None:
    page.section(
        "Against the first",
        "Differences on the same images, image by image. An interval that holds 0 says: not told "
        "apart. With this many rows one in twenty will miss 0 by chance.",
    )
    for subject in subjects[1:]:
        found = differences(subjects[0].scores, subject.scores)
        moved = [score for score in found if (score.value, score.low, score.high) != (0, 0, 0)]
        heading = f"{subject.name} minus {subjects[0].name}"
        page.table(["score", heading], [[f"{s.group}: {s.name}", shown(s)] for s in moved])


def _grid(page: Page, subject: Subject) -> None:
    linear = subject.linear
    page.section(
        f"Linear probes of {subject.name}",
        f"Chosen: {linear.chosen.setting}: {linear.chosen.validation:.1f} % on held-out training "
        f"images, {linear.chosen.test:.1f} % on test. Oracle: {linear.oracle.setting}: "
        f"{linear.oracle.test:.1f} % on test.",
        *edge_warning(linear),
    )
    curves: dict[str, list[float]] = {}
    for point in linear.grid:
        curves.setdefault(str(point.setting).partition(",")[0], []).append(point.validation)
    plot = plots.lines(curves, "learning rate", "held-out training images, %", places=rates_of(linear))
    page.figure((plot, "validation accuracy by learning rate"), "Accuracy that the choice is made by.")


def rates_of(linear: LinearScores) -> list[float]:
    """The learning rates of the grid, rising."""
    return sorted({point.setting.rate for point in linear.grid})


def edge_warning(linear: LinearScores) -> list[str]:
    """A line where the grid may be too small."""
    rates, rate = rates_of(linear), linear.chosen.setting.rate
    if len(rates) == 1 or rate not in (rates[0], rates[-1]):
        return []
    which = "highest" if rate == rates[-1] else "lowest"
    return [f"The chosen learning rate is the {which} of the grid: a wider grid (--rates) may find more."]


def _pictures(page: Page, report: Report) -> None:
    page.section(
        "Pictures",
        "Mean attention of the class token in the last block (dark to bright, square root), the "
        f"patches that hold {100 * MASS:g} % of it, and the foreground by the first main component of "
        "the patch tokens, coloured by three components of its own.",
    )
    pixels = report.pixels[:SHOWN]
    columns: dict[str, Iterator[Tensor]] = {"image": iter(pixels)}
    if report.masks is not None:
        objects = (report.masks[:SHOWN] != 0) & (report.masks[:SHOWN] != IGNORED)
        columns["mask"] = map(marked, pixels, objects)
    for subject in report.subjects:
        prefix = f"{subject.name} " if len(report.subjects) > 1 else ""
        attention = subject.seen.attention[:SHOWN].mean(dim=1)
        columns[f"{prefix}attention"] = iter(attention_heat(attention[:, None])[:, 0])
        columns[f"{prefix}{100 * MASS:g} % of it"] = map(marked, pixels, mass(attention))
        if min(subject.seen.patches.shape[1:3]) >= SMALLEST_GRID:
            columns[f"{prefix}foreground"] = iter(foreground_colours(subject.seen.patches)[0][:SHOWN])
    cells = [
        [(plots.png(drawn), f"{title}, image {i}") for i, drawn in enumerate(column)]
        for title, column in columns.items()
    ]
    page.pictures(list(columns), [list(row) for row in zip(*cells, strict=True)])
