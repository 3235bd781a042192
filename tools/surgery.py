"""Look into, convert, reshape and compare the weights of a vision transformer: one verb a task.

    python tools/surgery.py inspect dinov2_vits14_pretrain.pth
    python tools/surgery.py convert dinov2_vits14_pretrain.pth --to ours --out vits14.safetensors
    python tools/surgery.py VERB --help

Every verb reads every format: exports and checkpoints of this project, DeepSpeed's, released .pth files, and
the folders of Hugging Face and timm. Nothing is overwritten without --force. Exit status: 0 done, 1 two
models differ, 2 wrong input. docs/surgery.md shows every verb at work.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console, RenderableType
from rich.progress import Progress

from pretrain.command_line import Parser, exit_status
from pretrain.errors import InputError
from pretrain.export.examine import diff, inspect, verify
from pretrain.export.tables import (
    architecture_line,
    changes_table,
    difference_tables,
    inspection_tables,
    swapped_lines,
)
from pretrain.export.transform import (
    Operation,
    Order,
    Written,
    combine,
    consolidate,
    convert,
    recast,
    transform,
)
from pretrain.export.weights import Weights, read_weights
from pretrain.surgery.architecture import Settings
from pretrain.surgery.combine import ema_weights
from pretrain.surgery.conversion import Target
from pretrain.surgery.layouts import DEFAULT_CHUNKS
from pretrain.surgery.progress import Advance
from pretrain.surgery.registers import add_registers, drop_registers
from pretrain.surgery.resize import resize_channels, resize_patch, resize_positions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIFFER = 1  # exit status of diff and verify

Verb = Callable[[argparse.Namespace], int]
PIPE_WIDTH = 160  # columns of a table that goes elsewhere than to a terminal


class Output(Console):
    """A console that leaves it to `main` what to do when the reader has seen enough."""

    def on_broken_pipe(self) -> None:
        """Raise again, where rich ends the program with status 1."""
        raise BrokenPipeError


out = Output(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
errors = Console(stderr=True)
bars = Progress(console=errors, transient=True, disable=not errors.is_terminal)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="surgery.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_looks(verbs)
    _add_changes(verbs)
    _add_combinations(verbs)
    return parser.parse_args(arguments)


def _verb(verbs: Any, name: str, run: Verb, text: str, source: str = "FILE") -> argparse.ArgumentParser:
    """A verb that reads one source."""
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    verb.set_defaults(run=run)
    if source:
        verb.add_argument("source", metavar=source, type=Path, help="a file or folder of any known format")
    if name != "extract":
        verb.add_argument("--branch", metavar="NAME", help="student, teacher (the default), model_ema, ...")
    verb.add_argument("--num-heads", type=int, help="attention heads, where the source does not tell")
    verb.add_argument("--offset", type=float, help="of position interpolation: 0.1, or 0 with registers")
    verb.add_argument("--antialias", choices=["true", "false"], help="of position interpolation")
    verb.add_argument("--grid", type=_size, metavar="ROWSxCOLUMNS", help="of positions, where not square")
    return verb


def _writing(verbs: Any, name: str, run: Verb, text: str, source: str = "FILE") -> argparse.ArgumentParser:
    """A verb that writes what it made of its source."""
    verb = _verb(verbs, name, run, text, source)
    verb.add_argument("--out", type=Path, required=True, help="*.safetensors, or *.pth for other programs")
    verb.add_argument("--force", action="store_true", help="replace what is there")
    verb.add_argument("--allow-loss", action="store_true", help="write although something is lost")
    return verb


def _add_looks(verbs: Any) -> None:
    verb = _verb(verbs, "inspect", run_inspect, "Format, architecture, every tensor, and what is suspicious.")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--no-spectral", action="store_true", help="leave out spectral norms, the slow part")
    for name, run, tolerance, text in (
        (
            "diff",
            run_diff,
            0.0,
            "Do two backbones have the same architecture, tensors and features? Status 1: no.",
        ),
        ("verify", run_verify, 1e-5, "Do two formats of one model compute the same features? Status 1: no."),
    ):
        verb = _verb(verbs, name, run, text, source="")
        verb.add_argument("a", metavar="A", type=Path)
        verb.add_argument("b", metavar="B", type=Path)
        verb.add_argument(
            "--tolerance", type=_tolerance, default=tolerance, help=f"relative; default {tolerance:g}"
        )
        verb.add_argument("--json", action="store_true", help="print JSON")


def _add_changes(verbs: Any) -> None:
    verb = _writing(verbs, "convert", run_convert, "Write a backbone in another format.")
    verb.add_argument("--to", choices=get_args(Target), required=True, help="huggingface and timm: a folder")
    verb.add_argument("--chunks", type=int, help=f"of dinov2-chunked; default {DEFAULT_CHUNKS}")
    verb.add_argument("--split-swiglu", action="store_true", help="dinov2: w1 and w2 instead of w12")
    verb = _writing(verbs, "interpolate", run_interpolate, "Learned positions for another image size.")
    verb.add_argument("--image-size", type=_size, required=True, metavar="PX or HxW")
    verb = _writing(verbs, "resize-patch", run_resize_patch, "Patch embedding for another patch size.")
    verb.add_argument("--patch-size", type=int, required=True, metavar="PX")
    verb = _writing(verbs, "channels", run_channels, "Patch embedding for another number of channels.")
    verb.add_argument("--to", type=int, required=True, metavar="N")
    verb = _writing(verbs, "add-registers", run_add_registers, "More register tokens, drawn as for training.")
    verb.add_argument("number", metavar="N", type=int)
    verb.add_argument("--seed", type=int, default=0, help="of the draw; default 0")
    verb = _writing(verbs, "drop-registers", run_drop_registers, "Fewer register tokens.")
    verb.add_argument("--keep", type=int, default=0, metavar="N", help="of the first; default 0")
    verb = _writing(verbs, "cast", run_cast, "Another floating-point type.")
    verb.add_argument("--to", choices=list(DTYPES), required=True)


def _add_combinations(verbs: Any) -> None:
    verb = _writing(verbs, "extract", run_extract, "The backbone of one branch of a checkpoint.", source="")
    verb.add_argument("which", choices=["teacher", "student"])
    verb.add_argument("source", metavar="FILE", type=Path, help="a checkpoint of any known format")
    _writing(
        verbs, "consolidate", run_consolidate, "All tensors of a sharded checkpoint in one file.", "FOLDER"
    )
    verb = _writing(verbs, "average", run_average, "The average of several backbones.", source="")
    verb.add_argument("sources", metavar="FILE", type=Path, nargs="+", help="for --ema the oldest first")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--weights", type=_floats, metavar="W,W,...", help="one a file; default: equal")
    how.add_argument(
        "--ema", type=float, metavar="MOMENTUM", help="exponential moving average over the files"
    )


def _size(text: str) -> tuple[int, int]:
    """`518` or `224x448`."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 518 or 224x448")
    return int(parts[0]), int(parts[-1])


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 1,2,1") from None


def _settings(options: argparse.Namespace) -> Settings:
    antialias = None if options.antialias is None else options.antialias == "true"
    return Settings(options.num_heads, options.offset, antialias, options.grid)


def _stage(what: str, total: int) -> Advance:
    """One bar of the progress shown on a terminal."""
    task = bars.add_task(what, total=max(total, 1))
    return lambda done: bars.advance(task, done)


def _order(options: argparse.Namespace, branch: str | None = None) -> Order:
    return Order(
        options.out,
        sys.argv[1:],
        branch or options.branch,
        _settings(options),
        options.force,
        options.allow_loss,
        _stage,
    )


def _read(path: Path, options: argparse.Namespace) -> Weights:
    return read_weights(path, options.branch, _settings(options), stage=_stage)


def run_inspect(options: argparse.Namespace) -> int:
    """Print what is known about a file; status 0 also when something is suspicious."""
    found = inspect(options.source, options.branch, _settings(options), not options.no_spectral, _stage)
    if options.json:
        _print_json(asdict(found))
    else:
        _show(inspection_tables(found))
    return 0


def run_diff(options: argparse.Namespace) -> int:
    """Compare two backbones."""
    found = diff(_read(options.a, options), _read(options.b, options), _stage)
    beyond = found.beyond(options.tolerance)
    if options.json:
        _print_json({**asdict(found), "tolerance": options.tolerance, "differ": beyond})
    else:
        _show(difference_tables(found))
        print(f"{'differ beyond' if beyond else 'the same within'} a tolerance of {options.tolerance:g}")
    return DIFFER if beyond else 0


def run_verify(options: argparse.Namespace) -> int:
    """Compare what two formats of a model compute."""
    found = verify(_read(options.a, options), _read(options.b, options))
    same = found.difference <= options.tolerance
    if options.json:
        _print_json({**asdict(found), "tolerance": options.tolerance, "same": same})
        return 0 if same else DIFFER
    for path, program in zip((options.a, options.b), found.programs, strict=True):
        print(f"{path}: features by {program}")
    print(f"largest difference of features: {found.difference:.2e} of the largest feature")
    _show(swapped_lines(found.swapped))
    print(f"{'the same' if same else 'not the same'} within a tolerance of {options.tolerance:g}")
    return 0 if same else DIFFER


def run_convert(options: argparse.Namespace) -> int:
    """Another format."""
    if options.chunks is not None and options.to != "dinov2-chunked":
        raise InputError("--chunks: only for --to dinov2-chunked")
    if options.split_swiglu and not options.to.startswith("dinov2"):
        raise InputError("--split-swiglu: only for --to dinov2 and dinov2-chunked")
    chunks = DEFAULT_CHUNKS if options.chunks is None else options.chunks
    done = convert(options.source, options.to, _order(options), chunks, options.split_swiglu)
    return _report(options, done)


def _run(options: argparse.Namespace, operation: Operation) -> int:
    return _report(options, transform(options.source, operation, _order(options)))


def run_interpolate(options: argparse.Namespace) -> int:
    """Another image size."""
    return _run(options, lambda state, model: resize_positions(state, model, options.image_size))


def run_resize_patch(options: argparse.Namespace) -> int:
    """Another patch size."""
    return _run(options, lambda state, model: resize_patch(state, model, options.patch_size))


def run_channels(options: argparse.Namespace) -> int:
    """Another number of channels."""
    return _run(options, lambda state, model: resize_channels(state, model, options.to))


def run_add_registers(options: argparse.Namespace) -> int:
    """More registers."""
    return _run(options, lambda state, model: add_registers(state, model, options.number, options.seed))


def run_drop_registers(options: argparse.Namespace) -> int:
    """Fewer registers."""
    return _run(options, lambda state, model: drop_registers(state, model, options.keep))


def run_cast(options: argparse.Namespace) -> int:
    """Another floating-point type."""
    return _report(options, recast(options.source, DTYPES[options.to], _order(options)))


def run_extract(options: argparse.Namespace) -> int:
    """One branch's backbone."""
    order = _order(options, branch=options.which)
    return _report(options, transform(options.source, lambda state, model: (dict(state), model), order))


def run_consolidate(options: argparse.Namespace) -> int:
    """One file of a sharded checkpoint."""
    order = Order(options.out, sys.argv[1:], force=options.force, stage=_stage)
    print(f"{options.out}: {consolidate(options.source, order)} tensors of {options.source}")
    return 0


def run_average(options: argparse.Namespace) -> int:
    """One backbone of several."""
    number = len(options.sources)
    shares = options.weights or [1.0] * number
    if options.ema is not None:
        shares = ema_weights(number, options.ema)
    return _report(options, combine(options.sources, shares, _order(options), options.ema is not None))


def _report(options: argparse.Namespace, done: Written) -> int:
    """Say what was written, and what of the source is not in it."""
    _show(changes_table(done.changes))
    print(f"{options.out}: {done.tensors} tensors, {architecture_line(done.model)}")
    return 0


def _show(parts: Sequence[RenderableType]) -> None:
    for part in parts:
        if isinstance(part, str):
            print(part)  # never wrapped
        else:
            out.print(part)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=1, default=str))


def main() -> int:
    """Run one verb."""
    options = parse(sys.argv[1:])
    try:
        with bars:
            status = int(options.run(options))
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


if __name__ == "__main__":
    sys.exit(exit_status("surgery.py", main))
