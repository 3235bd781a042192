"""The report of a diagnosis or a comparison: one HTML file for someone who did not run it, figures beside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.analysis import plots
from pretrain.analysis.outliers import NORM_THRESHOLD
from pretrain.analysis.page import Page, write_figures
from pretrain.sinder.comparison import Subject
from pretrain.sinder.detection import ALIGNED, ANGLE_THRESHOLD, MIN_PATCHES
from pretrain.sinder.diagnosis import DEFECTIVE_RATIO, DEFECTIVE_SHARE, MILD_RATIO, MILD_SHARE
from pretrain.sinder.pictures import picture_table, worst_block
from pretrain.sinder.tables import Table, diagnosis_table, shares_table, summary_table

TONES = {"clean": "good", "mild": "doubtful", "defective": "bad", "unknown": ""}
QUESTION = (
    "In some vision transformers a few patch tokens grow far beyond the others, all along one direction that "
    "follows from the weights (singular defects; SINDER, arXiv 2407.16826). They spoil dense features, such "
    "as segmentation and depth, and attention maps. Does this model have them, where, and how many?"
)
AGAINST = (
    "Defects are counted along the first model's directions by the first model's thresholds, image by image: "
    "relative ones would move with the change and find something in every model. Cosines compare features "
    "after the final norm with the first model's, of patches that were clean there; 1 means unchanged."
)
CAVEATS = (
    "The verdict counts patches whose norm exceeds the image's median by "
    f"{NORM_THRESHOLD:g} median absolute deviations and whose |cos| with the predicted direction is at least "
    f"{ALIGNED:g}. `defective`: after some block {100 * DEFECTIVE_SHARE:g} % of the patches, "
    f"{DEFECTIVE_RATIO:g} times as long as the others; `mild`: {100 * MILD_SHARE:g} % and {MILD_RATIO:g} "
    "times.",
    f"The paper's criterion (|cos| above the image's mean by {ANGLE_THRESHOLD:g} deviations, from "
    f"{MIN_PATCHES} patches on) is relative: it flags up to 5.9 % of the patches of any image, clean ones "
    "too, and can see nothing where many patches lean towards the direction. It does not decide alone.",
    "Directions are predictions from linearised weights. Where few patches are defective, a handful of "
    "images says little about how many; take more with --number.",
)


@dataclass(frozen=True)
class Report:
    """What a report tells beside the figures."""

    title: str
    subjects: Sequence[Subject]
    images: Tensor | None  # (n, 3, s, s) from 0 to 1, to be shown: the first ones of the subjects' looks
    facts: Mapping[str, str]  # of the protocol


def write_report(path: Path, report: Report, figures: Mapping[str, Any]) -> None:
    """Write the page, and the figures beside it.

    Raises:
        InputError: a file cannot be written.
    """
    report_page(report).write(path)
    write_figures(path, figures)


def report_page(report: Report) -> Page:
    """Answer first, then evidence, pictures, protocol and all figures."""
    page, subjects = Page(report.title, QUESTION), report.subjects
    for subject in subjects:
        name, found = f"{subject.name}: " if len(subjects) > 1 else "", subject.diagnosis
        page.verdict(f"{name}{found.verdict}: {found.reason}", TONES[found.verdict])
    if len(subjects) > 1:
        _against(page, subjects)
    if subjects[0].diagnosis.layers:
        _evidence(page, subjects)
    if report.images is not None:
        _pictures(page, subjects, report.images)
    _predictions(page, subjects)
    page.section("Protocol")
    page.facts(report.facts)
    page.section("How to read this", *CAVEATS)
    for subject in subjects:
        page.section(f"All figures of {subject.name}")
        _table(page, diagnosis_table(subject))
    return page


def _table(page: Page, table: Table) -> None:
    page.table(table.headings, table.rows)


def _against(page: Page, subjects: Sequence[Subject]) -> None:
    page.section("Against the first", AGAINST)
    _table(page, summary_table(subjects))
    measures = {subject.name: subject.measure for subject in subjects if subject.measure}
    curves = {name: [100 * share for share in measure.by_both] for name, measure in measures.items()}
    plot = plots.lines(curves, "block", "defective patches, %")
    page.figure((plot, "defective patches of each model by block"), "By the first model's thresholds.")
    _table(page, shares_table(list(measures), list(measures.values())))


def _evidence(page: Page, subjects: Sequence[Subject]) -> None:
    first, layers = subjects[0], subjects[0].diagnosis.layers
    page.section("What images show", f"Patches of {first.diagnosis.images} images after each block.")
    whose = f" of {first.name}" if len(subjects) > 1 else ""
    shares = {
        "by norm and direction": [100 * layer.by_both for layer in layers],
        "by norm": [100 * layer.by_norm for layer in layers],
        "by angle (paper)": [100 * layer.by_angle for layer in layers],
    }
    plot = plots.lines(shares, "block", "patches, %", {"limit of the verdict": 100 * DEFECTIVE_SHARE})
    page.figure((plot, "share of patches that stand out, by block"), f"Patches{whose} that stand out.")
    ratios = {subject.name: [layer.norm_ratio for layer in subject.diagnosis.layers] for subject in subjects}
    plot = plots.lines(ratios, "block", "norm over that of others", {"limit of the verdict": DEFECTIVE_RATIO})
    page.figure((plot, "norm ratio by block"), "Norm of defective patches over the others' median; 1: none.")
    cosines = {
        "with the prediction": [layer.predicted_cosine for layer in layers],
        "between images": [layer.between_images for layer in layers],
    }
    plot = plots.lines(cosines, "block", "|cos|")
    caption = f"Mean direction of defective patches{whose}: with the prediction, and from image to image."
    page.figure((plot, "alignment of defective patches by block"), caption)
    if first.diagnosis.map is not None:
        plot = plots.heat_map(100 * first.diagnosis.map, "column", "row", "images, %")
        caption = f"Where they sit on the image{whose}, after block {worst_block(first)}."
        page.figure((plot, "share of images that are defective at each place"), caption)


def _pictures(page: Page, subjects: Sequence[Subject], images: Tensor) -> None:
    worst = worst_block(subjects[0])
    page.section(
        "Pictures",
        "Norm maps run from dark (0) to bright (the highest norm of any shown model on that image after that "
        f"block). Marked: patches that are defective after block {worst}. PCA: the three main components of "
        "the output patch tokens as colours, in one basis for all that is shown.",
    )
    page.pictures(*picture_table(subjects, images))
    norms = {subject.name: subject.seen.norms[:, worst] for subject in subjects if subject.seen}
    plot = plots.histogram(norms, f"norm after block {worst}")
    page.figure((plot, "histogram of patch norms"), "Norms of all patches of the images.")


def _predictions(page: Page, subjects: Sequence[Subject]) -> None:
    page.section(
        "What the weights predict",
        "Each block as a linear map of one token (paper, section 3.2): how much it stretches its favourite "
        "direction (gain), and how much all blocks so far do together (growth).",
    )
    gains = {subject.name: [layer.gain for layer in subject.directions] for subject in subjects}
    plot = plots.lines(gains, "block", "gain", log=True)
    page.figure((plot, "gain by block"), "Leading singular value of each block.")
    growth = {subject.name: [layer.log_growth for layer in subject.directions] for subject in subjects}
    plot = plots.lines(growth, "block", "ln of the growth")
    page.figure((plot, "growth by block"), "Leading singular value of the product of the blocks so far.")
