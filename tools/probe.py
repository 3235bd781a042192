"""Where to probe a frozen backbone: every layer and module, also under distribution shift (arXiv 2603.05280).

    python tools/probe.py a.safetensors --train 'train-*.tar' --test 'test-*.tar' --out probes/plain
    python tools/probe.py a.safetensors --train 'train-*.tar' --test 'test-*.tar' --out probes/shift \
        --shift sketch='sketch-*.tar' --corrupt contrast:5 speckle_noise:5 --controls

Weights of any format that tools/surgery.py reads; shards with classes (.cls). Features are computed once and
kept under --out; each probe is a line of --out/rows.jsonl as soon as it is fitted, and the same command goes
on where an interrupted one ended. --out/report.html says where to probe, report.figures.json beside it why.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Shown

from pretrain.analysis.corruptions import parse_corruption
from pretrain.analysis.images import image_size
from pretrain.analysis.options import WEIGHTS, add_model_options, check_counts, read_model
from pretrain.analysis.page import write_figures
from pretrain.analysis.scaling import scaling_for
from pretrain.analysis.taps import POINTS, Place, places
from pretrain.command_line import Parser, exit_status
from pretrain.config.derived import vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export.weights import Weights
from pretrain.probing.experiment import NEIGHBOURS, Method, specs
from pretrain.probing.report import report_page
from pretrain.probing.rows import Rows
from pretrain.probing.sets import LabelledSet, Preparation
from pretrain.probing.solvers import STRENGTHS, Solver
from pretrain.probing.suite import (
    Suite,
    asked,
    build_tasks,
    compute_features,
    distances,
    facts,
    figures,
    fit_missing,
    ordered,
)
from pretrain.probing.summary import answer, chosen_table, tasks

POOLS = ("cls", "patch_mean", "all_mean", "cls+patch_mean")
out, errors = Console(highlight=False, markup=False, width=140), Console(stderr=True)
bars = Progress(console=errors, transient=True, disable=not errors.is_terminal)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="probe.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="CKPT", type=Path, help=WEIGHTS)
    add("--train", metavar="SHARDS", nargs="+", required=True, help="to fit probes and to choose among them")
    add("--test", metavar="SHARDS", nargs="+", required=True, help="to report the chosen ones")
    add("--shift", metavar="NAME=SHARDS", nargs="+", default=[], help="further test sets of another kind")
    add("--corrupt", metavar="KIND:SEVERITY", nargs="+", default=[], help="copies of --test, as contrast:5")
    add("--protocol", choices=("transfer", "pretrain", "both"), default="transfer", help="see the report")
    add("--out", metavar="DIR", type=Path, required=True, help="for features, rows and report")
    add("--blocks", metavar="I", type=int, nargs="+", help="from 0; default: all")
    add("--points", choices=POINTS, nargs="+", help="modules of a block; default: all")
    add("--pools", choices=POOLS, nargs="+", default=["all_mean"], help="default: all_mean (paper)")
    add("--controls", action="store_true", help="also probes that tell width from content")
    add("--solver", choices=("torch", "sklearn", "ridge", "knn"), default="torch", help="default: torch")
    add("--C", type=float, nargs="+", default=list(STRENGTHS), help="strengths to choose from; paper: 1")
    add("--val-share", type=float, default=0.2, help="of the training images, to choose on; default 0.2")
    add("--group-key", metavar="KEY", help="of the .json members, such as patient: never on both sides")
    add_model_options(parser, "of splits, corruptions and controls", 64)
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace, weights: Weights) -> Suite:
    """What the command line asks for.

    Raises:
        InputError: it asks for what is not there.
    """
    check_counts(options, ("size", "batch_size"))
    if not all(0 < strength < float("inf") for strength in options.C):
        raise InputError("--C: must be above 0 and finite")
    if not 0 < options.val_share < 1:
        raise InputError(f"--val-share: {options.val_share:g} must be between 0 and 1")
    kind, choices = options.solver, NEIGHBOURS if options.solver == "knn" else options.C
    solver = Solver("torch" if kind == "knn" else kind, device=options.device, folder=options.out)
    method = Method(kind, choices, solver, options.seed)
    return Suite(
        options.out,
        LabelledSet("train", options.train, "--train"),
        _tests(options),
        ("transfer", "pretrain") if options.protocol == "both" else (options.protocol,),
        _places(options, weights.model),
        list(dict.fromkeys(options.pools)),
        options.controls,
        method,
        Preparation(image_size(weights, options.size), scaling_for(options, weights), options.seed),
        options.val_share,
        options.group_key,
        options.batch_size,
        options.device,
    )


def _tests(options: argparse.Namespace) -> list[LabelledSet]:
    found = [LabelledSet("test", options.test, "--test")]
    for text in options.shift:
        name, equals, pattern = text.partition("=")
        if not equals or not name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"--shift: {text} must be NAME=SHARDS, the name of letters, digits, - and _")
        found.append(LabelledSet(name, [pattern], "--shift"))
    for text in options.corrupt:
        corruption = parse_corruption(text)
        found.append(LabelledSet(str(corruption), options.test, "--test", corruption))
    folders = ["train", *(images.folder for images in found)]
    for images in found:
        if folders.count(images.folder) > 1:
            raise InputError(f"--shift, --corrupt: {images.name} is there twice; give sets other names")
    if options.protocol != "transfer" and len(found) == 1:
        raise InputError("--protocol: fits on shifted images; give --shift or --corrupt")
    return found


def _places(options: argparse.Namespace, model: ModelConfig) -> list[Place]:
    depth = vit_shape(model).depth
    for block in options.blocks or []:
        if not 0 <= block < depth:
            raise InputError(f"--blocks: {block} must be from 0 to {depth - 1}")
    found = [
        place
        for place in places(model)
        if (options.blocks is None or place.block in options.blocks)
        and (options.points is None or place.point in options.points)
    ]
    if not found:
        raise InputError(f"--points: the model has none of {', '.join(options.points)} (no LayerScale)")
    return found


def stage(what: str, total: int) -> Callable[[int], None]:
    """A progress bar for a part of the work."""
    task = bars.add_task(what, total=total)
    return lambda number: bars.advance(task, number)


def probe(options: argparse.Namespace, weights: Weights) -> int:
    """Compute features, fit probes, say where to probe."""
    suite = plan(options, weights)
    wanted = asked(suite, weights)
    rows = Rows(suite.out / "rows.jsonl", wanted)
    features = compute_features(suite, weights, stage)
    all_tasks = build_tasks(suite, features)
    fit_missing(suite, weights, all_tasks, rows, stage)
    found = ordered(rows.rows, specs(weights.model, suite.places, suite.pools, suite.controls), all_tasks)
    shifts = distances(suite, features)
    page, title = suite.out / "report.html", f"Where to probe {options.source.stem}"
    report_page(title, found, shifts, dict(facts(suite, options.source))).write(page)
    write_figures(page, figures(found, wanted, shifts))
    for task in tasks(found):
        of_task = [row for row in found if (row.fitted_on, row.protocol) == task]
        _print(*chosen_table(of_task))
        print(f"{task[0]} ({task[1]}): {answer(of_task)}")
    print(f"probe.py: wrote {page}", file=sys.stderr)
    return 0


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Shown(*headings, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def main() -> int:
    """Run the tool."""
    options = parse(sys.argv[1:])
    with bars:
        return probe(options, read_model(options, options.source))


if __name__ == "__main__":
    sys.exit(exit_status("probe.py", main))
