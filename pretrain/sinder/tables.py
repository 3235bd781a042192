"""What the tool prints about singular defects, as tables of text; the report shows the same."""

from collections.abc import Sequence
from typing import NamedTuple

from pretrain.sinder.comparison import Subject
from pretrain.sinder.held_out import Measure


class Table(NamedTuple):
    """Headings and rows; the first column is text, the others are figures."""

    headings: list[str]
    rows: list[list[str]]


WEIGHTS = ("block", "gain", "gap", "growth", "growth gap")
IMAGES = ("by angle %", "by norm %", "both %", "times as long", "to prediction", "between images")


def diagnosis_table(subject: Subject) -> Table:
    """A row per block: what the weights predict, and what images show."""
    rows = []
    for index, layer in enumerate(subject.directions):
        row = [f"{index}", f"{layer.gain:.2f}", f"{layer.gain_gap:.2f}"]
        row += [f"e^{layer.log_growth:.1f}", f"{layer.growth_gap:.2f}"]
        if subject.diagnosis.layers:
            seen = subject.diagnosis.layers[index]
            row += [_percent(share) for share in (seen.by_angle, seen.by_norm, seen.by_both)]
            row += [f"{seen.norm_ratio:.1f}", f"{seen.predicted_cosine:.2f}", f"{seen.between_images:.2f}"]
        rows.append(row)
    return Table([*WEIGHTS, *(IMAGES if subject.diagnosis.layers else ())], rows)


def shares_table(names: Sequence[str], measures: Sequence[Measure]) -> Table:
    """Defective patches in percent after each block, by norm and direction, a column per state."""
    shares = zip(*(measure.by_both for measure in measures), strict=True)
    rows = [[f"{index}", *map(_percent, row)] for index, row in enumerate(shares)]
    return Table(["defective patches after block, %", *names], rows)


def summary_table(subjects: Sequence[Subject]) -> Table:
    """A column per model: verdict, worst block, what it has kept of the first one, and scores on labels."""
    measures = [subject.measure for subject in subjects if subject.measure]
    rows = [
        ["verdict", *(subject.diagnosis.verdict for subject in subjects)],
        ["most defective patches after a block, %", *(_percent(max(m.by_both)) for m in measures)],
        ["class token, cosine to the first", *(f"{m.cls_cosine:.4f}" for m in measures)],
        ["clean patches, cosine to the first", *(f"{m.patch_cosine:.4f}" for m in measures)],
    ]
    for key, title in (("cls", "class token"), ("patch_mean", "mean patch")):
        if all(subject.knn for subject in subjects):
            scores = [(subject.knn or {})[key] for subject in subjects]
            rows.append([f"k-NN of the {title}, %", *(f"{score:.1f}" for score in scores)])
    pixels = [subject.segmentation for subject in subjects if subject.segmentation]
    if pixels:
        rows.append(["linear segmentation, mIoU %", *(f"{scores.miou:.1f}" for scores in pixels)])
        rows.append(
            ["linear segmentation, pixels right, %", *(f"{scores.accuracy:.1f}" for scores in pixels)]
        )
    return Table(["", *(subject.name for subject in subjects)], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
