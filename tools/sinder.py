"""Find and repair singular defects (SINDER, arXiv 2407.16826): patch tokens that grow along one direction.

    python tools/sinder.py diagnose dinov2_vitg14_pretrain.pth --images photos/ --report diagnosis.html
    python tools/sinder.py repair dinov2_vitg14_pretrain.pth --images photos/ --out repaired.pth
    python tools/sinder.py registers dinov2_vitg14_pretrain.pth --images photos/ --out with.safetensors
    python tools/sinder.py compare dinov2_vitg14_pretrain.pth repaired.pth --images photos/

Weights of any format that tools/surgery.py reads; images from a folder or from shards ('data/train-*.tar').
`diagnose` says `clean`, `mild` or `defective` and why; without images only what the weights predict.
`repair` trains singular values alone, watches held-out images, and writes the weights in the form they had;
where there is nothing to repair it writes nothing. An interrupted repair goes on when the same command is
given again. `registers` changes no weight: an export gets a test-time register instead (arXiv 2506.08010).
`compare` lays copies of one model side by side, by the thresholds of the first.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table as Shown

from pretrain.analysis.backbone import build_backbone, short_names
from pretrain.analysis.images import ImageSet, image_size
from pretrain.analysis.marks import shown_pixels
from pretrain.analysis.masks import read_masks
from pretrain.analysis.scaling import scaling_for
from pretrain.command_line import exit_status
from pretrain.config.derived import vit_shape
from pretrain.errors import InputError
from pretrain.export.weights import Weights, read_weights
from pretrain.sinder.comparison import Subject, compare
from pretrain.sinder.diagnosis import diagnose
from pretrain.sinder.directions import LayerDirection, defect_directions
from pretrain.sinder.document import comparison_document, diagnosis_document
from pretrain.sinder.held_out import Measure
from pretrain.sinder.hits import Criterion
from pretrain.sinder.labels import Labels
from pretrain.sinder.look import look
from pretrain.sinder.options import check, parse
from pretrain.sinder.registers_file import RegistersOrder, registers_file
from pretrain.sinder.registers_report import report_parts
from pretrain.sinder.repair import RepairSettings, Step
from pretrain.sinder.repair_file import RepairOrder, RepairReport, repair_file
from pretrain.sinder.repair_log import RepairLog
from pretrain.sinder.report import Report, write_report
from pretrain.sinder.tables import Table, diagnosis_table, shares_table, summary_table
from pretrain.surgery.architecture import Settings

PICTURES = 6  # images that a report shows
out, errors = Console(highlight=False, markup=False, width=120), Console(stderr=True)
bars = Progress(console=errors, transient=True, disable=not errors.is_terminal)


def _read(options: argparse.Namespace, path: Path) -> Weights:
    return read_weights(path, options.branch, Settings(num_heads=options.num_heads))


def _images(options: argparse.Namespace, weights: Weights) -> ImageSet:
    return ImageSet(options.images, image_size(weights, options.size), scaling_for(options, weights))


def _predict(weights: Weights, biases: bool = False) -> list[LayerDirection]:
    task = bars.add_task("predicting directions", total=vit_shape(weights.model).depth)
    return defect_directions(weights.state, weights.model, biases, lambda n: bars.advance(task, n))


def _chosen(images: ImageSet, places: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    indices, pixels = images.chosen(places)
    for line in images.damaged:
        print(f"sinder.py: left out: {line}", file=sys.stderr)
    return indices, pixels


def run_diagnose(options: argparse.Namespace) -> int:
    """Print a diagnosis."""
    weights = _read(options, options.sources[0])
    pixels = None
    if options.images:
        images = _images(options, weights)
        _, pixels = _chosen(images, images.drawn(options.seed, options.number))
    directions = _predict(weights, options.biases)
    backbone = build_backbone(weights, torch.device(options.device))
    batches = () if pixels is None else pixels.split(options.batch_size)
    task = bars.add_task("looking at images", total=0 if pixels is None else len(pixels))
    found = diagnose(backbone, directions, batches, lambda n: bars.advance(task, n))
    subject = Subject(weights.path.stem, directions, found)
    if options.json:
        print(json.dumps(diagnosis_document(subject), indent=1))
    else:
        _print(diagnosis_table(subject))
        print(f"{found.verdict}: {found.reason}")
    if options.report:
        if pixels is not None:
            shown, plain = pixels[:PICTURES], [layer.direction.float() for layer in directions]
            seen = look(backbone, shown, plain, options.batch_size)
            subject = Subject(subject.name, directions, found, seen)
        _report(options, [subject], pixels, weights, diagnosis_document(subject))
    return 0


def run_compare(options: argparse.Namespace) -> int:
    """Print what several models show on the same images."""
    if bool(options.knn_train) != bool(options.knn_test):
        raise InputError("--knn-train and --knn-test: one is given without the other")
    files = [_read(options, path) for path in options.sources]
    images = _images(options, files[0])
    indices, pixels = _chosen(images, images.drawn(options.seed, options.number))
    masks = read_masks(options.masks, images, indices) if options.masks else None
    labels = Labels(options.knn_train, options.knn_test, masks, images.scaling)
    subjects = _compare(options, files, pixels, labels)
    if options.json:
        print(json.dumps(comparison_document(subjects), indent=1))
    else:
        _print_comparison(subjects)
    if options.report:
        _report(options, subjects, pixels, files[0], comparison_document(subjects))
    return 0


def _compare(
    options: argparse.Namespace, files: Sequence[Weights], pixels: torch.Tensor, labels: Labels | None
) -> list[Subject]:
    names = short_names([weights.path for weights in files])
    task = bars.add_task("comparing", total=2 * len(files) * len(pixels))
    device = torch.device(options.device)
    return compare(files, names, pixels, device, options.batch_size, labels, lambda n: bars.advance(task, n))


def _report(
    options: argparse.Namespace,
    subjects: Sequence[Subject],
    pixels: torch.Tensor | None,
    weights: Weights,
    figures: dict[str, Any],
) -> None:
    facts = {subject.name: str(path) for subject, path in zip(subjects, _files(options), strict=True)}
    if pixels is not None:
        facts["images"] = f"{len(pixels)} of {options.images}, {pixels.shape[-1]} px, seed {options.seed}"
    facts["command"] = " ".join(["sinder.py", *sys.argv[1:]])
    shown = None if pixels is None else shown_pixels(pixels[:PICTURES], scaling_for(options, weights))
    title = "Singular defects of " + ", ".join(subject.name for subject in subjects)
    write_report(options.report, Report(title, subjects, shown, facts), figures)
    print(f"sinder.py: wrote {options.report}", file=sys.stderr)


def _files(options: argparse.Namespace) -> list[Path]:
    """The files that a report is about."""
    return [*options.sources, *([options.out] if hasattr(options, "out") else [])]


def run_repair(options: argparse.Namespace) -> int:
    """Repair, and say what changed."""
    weights = _read(options, options.sources[0])
    images, directions = _images(options, weights), _predict(weights)
    criterion = Criterion(least=options.least, limit_layers=options.limit_layers)
    settings = RepairSettings(
        criterion,
        lr=options.lr,
        batch_size=options.batch_size,
        max_images=options.max_images,
        stop_share=options.stop_share,
        window=options.window,
        bf16=options.bf16,
        seed=options.seed,
    )
    order = RepairOrder(
        options.out,
        sys.argv[1:],
        options.force,
        options.held_out,
        options.check_every,
        options.min_cls_cosine,
        options.min_patch_cosine,
        options.device,
    )
    task = bars.add_task("repairing", total=options.max_images)
    goes_on = order.progress.exists()
    with closing(RepairLog(options.log, goes_on)) as log:
        report = repair_file(weights, directions, images, settings, order, _watch(task, log))
    _print_repair(options.out, report)
    if report.written:
        _report_change(options, weights, images)
    return 0


def _watch(task: TaskID, log: RepairLog) -> Any:
    def watch(step: Step, measure: Measure | None) -> None:
        text = f"{step.defective_patches} defective patches, {100 * step.clean_share:.0f} % of images clean"
        bars.update(task, completed=step.images, description=text)
        log.write(step, measure)
        if measure is not None:
            cls, patches = measure.drift
            share = f"{100 * max(measure.by_both):.2f} % defective held-out patches"
            cosines = f"class token {cls:.4f}, clean patches {patches:.4f}"
            print(f"{step.images} images: {share}, {cosines}", file=sys.stderr)

    return watch


def run_registers(options: argparse.Namespace) -> int:
    """Find register neurons, and say what they do."""
    weights = _read(options, options.sources[0])
    order = RegistersOrder(
        options.out,
        options.hook,
        sys.argv[1:],
        options.force,
        options.neurons,
        options.last_block,
        options.number,
        options.held_out,
        options.batch_size,
        options.seed,
        options.min_cls_cosine,
        options.min_patch_cosine,
        options.device,
    )
    images, directions = _images(options, weights), _predict(weights)
    task = bars.add_task("finding neurons", total=options.number)
    found = registers_file(weights, directions, images, order, lambda n: bars.advance(task, n))
    for part in report_parts(options.out, options.hook, found):
        print(part) if isinstance(part, str) else out.print(part)
    if found.chosen is not None:
        _report_change(options, weights, images)
    return 0


def _report_change(options: argparse.Namespace, weights: Weights, images: ImageSet) -> None:
    """Original and result on the held-out images, where a report is asked for."""
    if not options.report:
        return
    _, pixels = images.chosen(images.held_out(options.seed, options.held_out))
    subjects = _compare(options, [weights, _read(options, options.out)], pixels, None)
    _report(options, subjects, pixels, weights, comparison_document(subjects))


def _print(table: Table) -> None:
    shown = Shown(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.headings):
        shown.add_column(name, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*row)
    out.print(shown)


def _print_comparison(subjects: Sequence[Subject]) -> None:
    measures = [subject.measure for subject in subjects if subject.measure]
    _print(shares_table([subject.name for subject in subjects], measures))
    _print(summary_table(subjects))


def _print_repair(path: Path, report: RepairReport) -> None:
    print(f"before: {report.verdict_before}: {report.reason_before}")
    for line in report.damaged_images:
        print(f"left out: {line}")
    if report.before is None or report.after is None:
        print("nothing to repair, nothing written")
        return
    _print(shares_table(["before", "after"], [report.before, report.after]))
    cls, patches = report.after.drift
    print(f"cosine to the original: class token {cls:.4f}, clean patches {patches:.4f}")
    done = f"{report.outcome} after {report.images} images"
    if report.written:
        print(f"{path}: {done}; now {report.verdict_after}")
        return
    print(f"{done}, nothing written; still {report.verdict_after}")
    if report.outcome == "nothing trained":
        print("in no image did --least patches stand out by their angle, or gradients were not finite")


def main() -> int:
    """Run one verb."""
    options = parse(sys.argv[1:], str(__doc__))
    check(options)
    with bars:
        match options.verb:
            case "diagnose":
                return run_diagnose(options)
            case "repair":
                return run_repair(options)
            case "registers":
                return run_registers(options)
            case _:
                return run_compare(options)


if __name__ == "__main__":
    sys.exit(exit_status("sinder.py", main))
