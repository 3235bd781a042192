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
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.progress import Progress

from pretrain.command_line import exit_status
from pretrain.errors import InputError
from pretrain.export.examine import diff, inspect, verify
from pretrain.export.surgery_options import parse_verb
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
from pretrain.surgery.layouts import DEFAULT_CHUNKS
from pretrain.surgery.progress import Advance
from pretrain.surgery.registers import add_registers, drop_registers
from pretrain.surgery.resize import resize_channels, resize_patch, resize_positions

DIFFER = 1  # exit status of diff and verify

PIPE_WIDTH = 160  # columns of a table that goes elsewhere than to a terminal


class Output(Console):
    """A console that leaves it to `main` what to do when the reader has seen enough."""

    def on_broken_pipe(self) -> None:
        """Raise again, where rich ends the program with status 1."""
        raise BrokenPipeError


out = Output(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
errors = Console(stderr=True)
bars = Progress(console=errors, transient=True, disable=not errors.is_terminal)


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
    return _report(options, recast(options.source, getattr(torch, options.to), _order(options)))


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


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": run_inspect,
    "diff": run_diff,
    "verify": run_verify,
    "convert": run_convert,
    "interpolate": run_interpolate,
    "resize-patch": run_resize_patch,
    "channels": run_channels,
    "add-registers": run_add_registers,
    "drop-registers": run_drop_registers,
    "cast": run_cast,
    "extract": run_extract,
    "consolidate": run_consolidate,
    "average": run_average,
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `run` is the function of its verb."""
    options = parse_verb(arguments, str(__doc__))
    options.run = VERBS[options.verb]
    return options


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
