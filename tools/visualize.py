"""What models see in images: components, attention, norms, artifacts and similarity of patch tokens.

    python tools/visualize.py teacher.safetensors --images photos/ --out seen/
    python tools/visualize.py a.pth b.pth --images 'data/test-*.tar' --number 4 --out both.html --patch 3,5

Weights of any format that tools/surgery.py reads, several of them side by side; images from a folder or from
shards. A name that ends in .png gets one sheet, .html a page that stands alone (figures beside it); any other
name is a folder that gets both.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from pretrain.analysis import plots
from pretrain.analysis.backbone import build_backbone, short_names
from pretrain.analysis.gallery import Part, Wanted, gallery, outlier_shares
from pretrain.analysis.images import ImageSet, image_size
from pretrain.analysis.marks import shown_pixels
from pretrain.analysis.options import IMAGES, WEIGHTS, add_model_options, check_counts, read_model
from pretrain.analysis.page import Page, check_page, write_figures
from pretrain.analysis.scaling import scaling_for
from pretrain.analysis.sheet import HEADS, stacked, table
from pretrain.analysis.view import View, view
from pretrain.command_line import Parser, exit_status
from pretrain.errors import InputError
from pretrain.export.weights import Weights

QUESTION = (
    "What do patch tokens and the class token of a vision transformer tell about an image: which parts "
    "belong together, where does the class token look, and do some patches stand out that should not?"
)
NUMBER = 8  # images shown where no number is given
bars = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="visualize.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("sources", metavar="CKPT", type=Path, nargs="+", help=WEIGHTS)
    add("--images", metavar="SRC", required=True, help=IMAGES)
    add("--out", type=Path, required=True, help="FILE.png, FILE.html, or a folder for both")
    add("--number", type=int, help=f"images, the first of a seeded order; default {NUMBER}")
    add_model_options(parser, "of the order of the images")
    add("--block", type=int, default=-1, help="whose attention is shown, from 0; default: the last (-1)")
    add("--blocks", type=int, nargs="+", default=[], metavar="BLOCK", help="after which norms are shown")
    add("--heads", type=int, default=HEADS, help=f"of which attention is shown; default {HEADS}")
    add(
        "--patch", type=_patch, metavar="ROW,COL", help="of the first image, to compare with; default: middle"
    )
    add("--force", action="store_true", help="replace files that are there")
    return parser.parse_args(arguments)


def _patch(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a row and a column, such as 3,5") from error
    return row, column


def targets(options: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The sheet and the page that are asked for, checked before anything is read."""
    check_counts(options, ("number", "size", "heads", "batch_size"))
    out: Path = options.out
    sheet: Path | None
    page: Path | None
    match out.suffix:
        case ".png":
            sheet, page = out, None
        case ".html":
            sheet, page = None, out
        case _:
            sheet, page = out / "sheet.png", out / "page.html"
    if page:
        check_page(page, options.force, "--out")
    if sheet and sheet.exists() and not options.force:
        raise InputError(f"--out: {sheet} exists; choose another name, or --force")
    return sheet, page


def see(options: argparse.Namespace, files: Mapping[str, Weights]) -> tuple[dict[str, View], Tensor]:
    """What each model sees, and the images (n, 3, s, s) from 0 to 1 as the first one gets them."""
    views: dict[str, View] = {}
    shown: Tensor | None = None
    for name, weights in files.items():
        scaling = scaling_for(options, weights)
        images = ImageSet(options.images, image_size(weights, options.size), scaling)
        number = options.number or min(NUMBER, len(images))
        _, pixels = images.chosen(images.drawn(options.seed, number))
        if shown is None:
            shown = shown_pixels(pixels, scaling)
            for line in images.damaged:
                print(f"visualize.py: left out: {line}", file=sys.stderr)
        task = bars.add_task(name, total=len(pixels))
        backbone = build_backbone(weights, torch.device(options.device))
        advance = partial(bars.advance, task)
        views[name] = view(backbone, pixels, options.batch_size, options.block, advance)
    assert shown is not None
    return views, shown


def draw_sheet(path: Path, parts: Sequence[Part], names: Sequence[str]) -> None:
    """All parts in one PNG file; several models by letters, because columns are narrow."""
    letters = dict(zip(names, ascii_uppercase, strict=False)) if len(names) > 1 else {}
    drawn = []
    for part in parts:
        titles = [_lettered(title, letters) for title in part.columns]
        drawn.append((part.heading, table(list(part.columns.values()), titles)))
    if letters:
        head, first = drawn[0]
        key = ", ".join(f"{letter} = {name}" for name, letter in letters.items())
        drawn[0] = (f"{key}. {head}", first)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plots.png(stacked(drawn).float() / 255))


def _lettered(title: str, letters: Mapping[str, str]) -> str:
    for name, letter in letters.items():
        if title.startswith(f"{name} "):
            return f"{letter} {title.removeprefix(f'{name} ')}"
    return title


def draw_page(
    path: Path, parts: Sequence[Part], views: Mapping[str, View], facts: Mapping[str, str]
) -> dict[str, Any]:
    """All parts in one HTML file, figures beside it, which are returned."""
    page = Page("What " + ", ".join(views) + (" see" if len(views) > 1 else " sees"), QUESTION)
    for part in parts:
        page.section(part.heading, part.text)
        cells = [
            [(plots.png(drawn), f"{title}, image {i}") for i, drawn in enumerate(column)]
            for title, column in part.columns.items()
        ]
        page.pictures(list(part.columns), [list(row) for row in zip(*cells, strict=True)])
    shares = {name: [100 * share for share in outlier_shares(seen)] for name, seen in views.items()}
    page.section("Artifacts by block", "Patches that stand out by their norm, by the same criterion.")
    page.figure((plots.lines(shares, "block", "patches, %"), "patches that stand out, by block"))
    page.section("Protocol")
    page.facts(facts)
    page.write(path)
    figures = {"outlier_percent_by_block": shares, **facts}
    write_figures(path, figures)
    return figures


def main() -> int:
    """Look, draw, write."""
    options = parse(sys.argv[1:])
    sheet, page = targets(options)
    names = short_names(options.sources)
    files = {name: read_model(options, path) for name, path in zip(names, options.sources, strict=True)}
    with bars:
        views, pixels = see(options, files)
    parts = gallery(views, pixels, Wanted(options.patch, options.blocks, options.heads))
    if sheet:
        draw_sheet(sheet, parts, list(views))
    if page:
        facts = dict(zip(views, map(str, options.sources), strict=True))
        facts["images"] = f"{len(pixels)} of {options.images}, seed {options.seed}"
        facts["attention"] = "of the last block" if options.block == -1 else f"of block {options.block}"
        facts["command"] = " ".join(["visualize.py", *sys.argv[1:]])
        draw_page(page, parts, views, facts)
    for path in filter(None, (sheet, page)):
        print(f"visualize.py: wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("visualize.py", main))
