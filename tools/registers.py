"""What registers and the class token of a backbone carry, with honest controls (arXiv 2604.14433).

    python tools/registers.py teacher.safetensors --images photos/ --report registers.html
    python tools/registers.py a.pth --images 'data/val-*.tar' --number 2000 --train 4000
    python tools/registers.py a.pth --images photos/ --conditions registers:zero,registers:bank --blocks 3-8

Weights of any format that tools/surgery.py reads; images from a folder or from shards. After blocks tokens of
a set (registers, cls, reg:I, patch:K random patches) are replaced (zero, mean, noise, shuffle, bank, random);
patches, attention and tasks are compared with the full model's: correspondence of warped images, with classes
(folders, .cls members) linear probes and recall, with --masks segmentation. Of the seeded order the first
images are scored, the next fit probes, the next calibrate. A calibration is kept with --calibration.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Shown

from pretrain.analysis.images import ImageSet, image_size
from pretrain.analysis.options import (
    IMAGES,
    WEIGHTS,
    add_model_options,
    add_report_options,
    check_counts,
    read_model,
)
from pretrain.analysis.page import Table, check_page
from pretrain.analysis.scaling import scaling_for
from pretrain.command_line import Parser, exit_status
from pretrain.errors import InputError
from pretrain.export.weights import Weights
from pretrain.registers.conditions import DEFAULT, KNOWN, parse_condition
from pretrain.registers.document import experiment_document
from pretrain.registers.experiment import Experiment, Order, run
from pretrain.registers.findings import findings
from pretrain.registers.report import write_report
from pretrain.registers.tables import effect_table, summary_table, task_table

PICTURES = 4  # images that a report shows
PLAIN = Order(())
out, errors = Console(highlight=False, markup=False, width=120), Console(stderr=True)
bars = Progress(console=errors, transient=True, disable=not errors.is_terminal)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="registers.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("source", metavar="CKPT", type=Path, help=WEIGHTS)
    parser.add_argument("--images", metavar="SRC", required=True, help=IMAGES)
    parser.add_argument("--masks", metavar="DIR", type=Path, help="NAME.png of classes for each image")
    parser.add_argument("--conditions", metavar="A,B,...", default=",".join(DEFAULT), help=KNOWN)
    parser.add_argument("--blocks", default="all", help="after which: all, one such as 11, or 3-8")
    parser.add_argument(
        "--calibration", metavar="FILE.safetensors", type=Path, help="made if it is not there"
    )
    for name, default, text in (
        ("--number", PLAIN.number, "images that are scored"),
        ("--train", PLAIN.train, "images that probes are fitted on, where there are classes or masks"),
        ("--calibration-images", PLAIN.calibration_images, "images of a calibration that is made"),
        ("--bank-images", PLAIN.bank_images, "of them whose tokens are kept for bank"),
        ("--attention-images", PLAIN.attention_images, "images whose attention is compared"),
        ("--pairs", PLAIN.pairs, "images that are warped for correspondence"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text}; default {default}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_report_options(parser)
    add_model_options(parser, "of images and of all draws", PLAIN.batch_size)
    return parser.parse_args(arguments)


def order_of(options: argparse.Namespace) -> Order:
    """What the command line asks for.

    Raises:
        InputError: it asks for what cannot be.
    """
    counts = ("number", "train", "calibration_images", "bank_images", "pairs", "batch_size")
    check_counts(options, ("size", *counts))
    check_counts(options, ("attention_images",), 0)
    conditions = list(dict.fromkeys(map(parse_condition, options.conditions.split(","))))
    if options.batch_size == 1 and any(condition.mode == "shuffle" for condition in conditions):
        raise InputError("--batch-size: shuffle takes tokens from another image of the batch; take 2 or more")
    names = ("blocks", "masks", "device", "seed", *counts, "attention_images")
    return Order(
        conditions,
        calibration_file=options.calibration,
        pictures=PICTURES if options.report else 0,
        **{name: getattr(options, name) for name in names},
    )


def check(options: argparse.Namespace) -> None:
    """Refuse files that could not be written in the end."""
    calibration = options.calibration
    if calibration is not None and calibration.suffix != ".safetensors":
        raise InputError(f"--calibration: {calibration} must end in .safetensors")
    if options.report:
        check_page(options.report, options.force)


def image_set(options: argparse.Namespace, weights: Weights) -> ImageSet:
    """The images, at a size that the model can have."""
    return ImageSet(options.images, image_size(weights, options.size), scaling_for(options, weights))


def stage(words: str, images: int) -> Callable[[int], None]:
    """A bar."""
    task = bars.add_task(words, total=images)
    return lambda number: bars.advance(task, number)


def show(experiment: Experiment) -> None:
    """The tables, then the answer."""
    _print(summary_table(experiment.result))
    for task in experiment.result.scores:
        _print(task_table(task, experiment.result))
    _print(effect_table(experiment.result))
    print(f"effective rank of the full model's patches: {experiment.result.effective_rank:.1f}")
    for found in findings(experiment.result):
        print(found.line)


def _print(table: Table) -> None:
    shown = Shown(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.headings):
        shown.add_column(name, justify="right" if index else "left", no_wrap=not index)
    for row in table.rows:
        shown.add_row(*row)
    out.print(shown)


def note(experiment: Experiment, images: ImageSet) -> None:
    """Lines on stderr about what was left out."""
    for line in dict.fromkeys(images.damaged):
        print(f"registers.py: left out: {line}", file=sys.stderr)
    if experiment.left_out:
        names = ", ".join(map(str, experiment.left_out))
        print(f"registers.py: the model has no registers; left out: {names}", file=sys.stderr)


def report(options: argparse.Namespace, experiment: Experiment, images: ImageSet) -> None:
    """The page."""
    classes = f"{experiment.classes} classes" if experiment.classes else "no classes"
    facts = {
        "weights": str(options.source),
        "images": f"{experiment.result.images} scored of {options.images} ({classes}), {images.size} px",
        "probes": f"fitted on {options.train} images" if experiment.classes or options.masks else "none",
        "calibration": f"{experiment.calibration_images} other images",
        "blocks": options.blocks,
        "seed": str(options.seed),
        "command": " ".join(["registers.py", *sys.argv[1:]]),
    }
    write_report(options.report, experiment, f"What registers of {options.source.stem} carry", facts)
    print(f"registers.py: wrote {options.report}", file=sys.stderr)


def main() -> int:
    """Run the experiment."""
    options = parse(sys.argv[1:])
    check(options)
    order = order_of(options)
    weights = read_model(options, options.source)
    images = image_set(options, weights)
    with bars:
        experiment = run(weights, images, order, stage)
    note(experiment, images)
    if options.json:
        print(json.dumps(experiment_document(experiment), indent=1))
    else:
        show(experiment)
    if options.report:
        report(options, experiment, images)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("registers.py", main))
