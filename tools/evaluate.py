"""What a frozen backbone is worth: k-NN, linear probes, retrieval, segmentation, attention in numbers.

    python tools/evaluate.py teacher.safetensors --train 'data/train-*.tar' --test 'data/test-*.tar'
    python tools/evaluate.py a.pth b.pth --train 'data/train-*.tar' --test 'data/test-*.tar' \\
        --images photos/ --masks masks/ --report both.html

Weights of any format that tools/surgery.py reads, several of them side by side on the same images; labelled
shards (.cls members). With masks (NAME.png of classes for each image of the folder, 0 = background, 255 =
does not count) linear segmentation and the alignment of attention with objects too.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from pretrain.analysis.backbone import build_backbone, short_names
from pretrain.analysis.evaluation import (
    TEMPERATURE,
    alignment_scores,
    consistency_scores,
    knn_scores,
    linear_scores,
    neighbours,
    retrieval_scores,
    segmentation_scores,
)
from pretrain.analysis.evaluation_report import (
    Report,
    Subject,
    document,
    edge_warning,
    score_rows,
    write_report,
)
from pretrain.analysis.images import ImageSet, image_size
from pretrain.analysis.last_blocks import LastBlocks, last_blocks
from pretrain.analysis.linear_probe import RATES, ProbeSettings, linear_probe
from pretrain.analysis.marks import shown_pixels
from pretrain.analysis.masks import read_masks
from pretrain.analysis.options import (
    WEIGHTS,
    add_model_options,
    add_report_options,
    check_counts,
    read_model,
)
from pretrain.analysis.page import check_page
from pretrain.analysis.scaling import scaling_for
from pretrain.analysis.view import view
from pretrain.command_line import Parser, exit_status
from pretrain.errors import InputError
from pretrain.export.weights import Weights
from pretrain.models.vit import VisionTransformer

CROP, RESIZE = 224, 256  # pixels, as DINOv2 evaluates; models of a smaller position grid get that
NUMBER = 200  # images for attention and masks
PROBE = ProbeSettings()
out, errors = Console(highlight=False, markup=False, width=120), Console(stderr=True)
bars = Progress(console=errors, transient=True, disable=not errors.is_terminal)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("sources", metavar="CKPT", type=Path, nargs="+", help=WEIGHTS)
    add(
        "--train",
        metavar="SHARDS",
        nargs="+",
        required=True,
        help="labelled: neighbours, and what probes fit",
    )
    add("--test", metavar="SHARDS", nargs="+", required=True, help="labelled")
    add("--images", metavar="SRC", help="for attention: a folder or shards; default: the first of --test")
    add("--masks", metavar="DIR", type=Path, help="NAME.png of classes for each image of the folder --images")
    add("--number", type=int, help=f"images for attention and masks; default {NUMBER}, or all there are")
    add_model_options(
        parser, "of the order of images and of the probes", 64, f"{CROP}, or those of a smaller position grid"
    )
    add("--resize", type=int, help=f"shorter side before the cut; default: size * {RESIZE} / {CROP}")
    add("--rates", type=float, nargs="+", default=list(RATES), metavar="LR", help="grid of the probes")
    add("--epochs", type=int, default=PROBE.epochs, help=f"of the probes; default {PROBE.epochs}")
    add("--json", action="store_true", help="print JSON")
    add_report_options(parser)
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read."""
    check_counts(options, ("number", "size", "resize", "epochs", "batch_size"))
    if not all(0 < rate < float("inf") for rate in options.rates):
        raise InputError("--rates: must be above 0")
    if options.masks and not options.images:
        raise InputError("--masks: needs --images, the folder of the images they belong to")
    if options.report:
        check_page(options.report, options.force)


def size_of(options: argparse.Namespace, weights: Weights) -> int:
    """Pixels of the images that a model gets."""
    patch = weights.model.patch_size
    whole = max(1, min(CROP, weights.model.img_size) // patch) * patch
    return image_size(weights, options.size or whole)


def features(
    options: argparse.Namespace, weights: Weights, backbone: VisionTransformer, split: str
) -> LastBlocks:
    """Frozen features of a split's shards."""
    crop = size_of(options, weights)
    resize = options.resize or round(crop * RESIZE / CROP)
    task = bars.add_task(f"features of --{split}", total=None)
    batches = scaling_for(options, weights).labelled(
        getattr(options, split), f"--{split}", resize, crop, options.batch_size
    )
    return last_blocks(backbone, batches, partial(bars.advance, task))


def looked_at(options: argparse.Namespace, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """Images (n, 3, S, S) for attention, and their masks where there are any."""
    size, scaling = size_of(options, weights), scaling_for(options, weights)
    images = ImageSet(options.images or options.test[0], size, scaling)
    number = options.number or min(NUMBER, len(images))
    indices, pixels = images.chosen(images.drawn(options.seed, number))
    for line in images.damaged:
        print(f"evaluate.py: left out: {line}", file=sys.stderr)
    return pixels, read_masks(options.masks, images, indices) if options.masks else None


def evaluate(
    options: argparse.Namespace, weights: Weights, name: str
) -> tuple[Subject, Tensor, Tensor | None, dict[str, str]]:
    """All scores of a model, the images (n, 3, s, s) from 0 to 1, their masks, and what was done."""
    pixels, masks = looked_at(options, weights)
    backbone = build_backbone(weights, torch.device(options.device))
    seen = view(backbone, pixels, options.batch_size)
    dense = consistency_scores(backbone, pixels, options.batch_size)
    if masks is not None:
        dense += [*segmentation_scores(seen, masks), *alignment_scores(seen, masks)]
    train, test = (features(options, weights, backbone, split) for split in ("train", "test"))
    task = bars.add_task("linear probes", total=4)
    settings = ProbeSettings(sorted(set(options.rates)), options.epochs, seed=options.seed)
    linear = linear_probe(train, test, settings, partial(bars.advance, task))
    scores = [*knn_scores(train, test), *linear_scores(linear), *retrieval_scores(train, test), *dense]
    shown = shown_pixels(pixels, scaling_for(options, weights))
    return Subject(name, scores, linear, seen), shown, masks, facts_of(train, test, pixels)


def facts_of(train: LastBlocks, test: LastBlocks, pixels: Tensor) -> dict[str, str]:
    """What was done, in numbers."""
    classes, counts = len(train.labels.unique()), ", ".join(map(str, neighbours(len(train.labels))))
    return {
        "training images": f"{len(train.labels)} in {classes} classes",
        "test images": f"{len(test.labels)}",
        "size": f"{pixels.shape[-1]} px, centre crop",
        "k-NN": f"cosine, temperature {TEMPERATURE:g}, k = {counts}",
        "images for attention and masks": f"{len(pixels)}",
    }


def print_scores(subjects: list[Subject]) -> None:
    """The table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(["evaluation", "score", *(subject.name for subject in subjects)]):
        table.add_column(heading, justify="right" if index > 1 else "left")
    for row in score_rows(subjects):
        table.add_row(*row)
    out.print(table)
    for subject in subjects:
        for line in edge_warning(subject.linear):
            print(f"{subject.name}: {line}")


def main() -> int:
    """Evaluate, print, write."""
    options = parse(sys.argv[1:])
    check(options)
    names = short_names(options.sources)
    files = [read_model(options, path) for path in options.sources]
    facts: dict[str, Any] = dict(zip(names, map(str, options.sources), strict=True))
    found = []
    with bars:
        for weights, name in zip(files, names, strict=True):
            found.append(evaluate(options, weights, name))
    _, pixels, masks, done = found[0]
    facts |= {
        f"size for {s.name}": other["size"] for s, _, _, other in found if other["size"] != done["size"]
    }
    facts |= {**done, "seed": str(options.seed), "command": " ".join(["evaluate.py", *sys.argv[1:]])}
    report = Report([subject for subject, *_ in found], pixels, masks, facts)
    if options.json:
        print(json.dumps(document(report), indent=1))
    else:
        print_scores([subject for subject, *_ in found])
    if options.report:
        write_report(options.report, report)
        print(f"evaluate.py: wrote {options.report}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("evaluate.py", main))
