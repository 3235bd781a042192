"""Options that the tools share which look at models: which weights, on which device, at which size."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.analysis.scaling import add_scaling
from pretrain.errors import InputError
from pretrain.export.weights import Weights, read_weights
from pretrain.surgery.architecture import Settings

WEIGHTS = "weights of any known format"
IMAGES = "a folder, or a pattern of shards"


def add_model_options(
    parser: argparse.ArgumentParser,
    seed: str,
    batch_size: int = 8,
    size: str = "those of the position grid",
) -> None:
    """Add what `read_model` and `scaling_for` read, and the size, number and order of images.

    Args:
        parser: of a tool or a verb.
        seed: what it decides.
        batch_size: the default.
        size: the default in words.
    """
    add = parser.add_argument
    add("--size", type=int, help=f"pixels of the images; default: {size}")
    add_scaling(parser)
    add("--batch-size", type=int, default=batch_size, help=f"images at once; default {batch_size}")
    add(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...; default: a GPU where there is one",
    )
    add("--num-heads", type=int, help="attention heads, where the weights do not tell")
    add("--branch", metavar="NAME", help="student or teacher, where there are both")
    add("--seed", type=int, default=0, help=f"{seed}; default 0")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add --report and --force, which `check_page` is given."""
    parser.add_argument(
        "--report", metavar="FILE.html", type=Path, help="a page with tables, plots and pictures"
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")


def usable_device(text: str) -> str:
    """A type of option: the name of a device that tensors can be put on."""
    try:
        torch.empty(1, device=text).cpu()
    except (RuntimeError, AssertionError) as error:  # torch has no kind of its own for this
        fault = f"{text}: this machine, or its torch, has no such device; take cpu"
        raise argparse.ArgumentTypeError(fault) from error
    return text


def read_model(options: argparse.Namespace, path: Path) -> Weights:
    """The weights of a file or folder, with what the options say about them.

    Raises:
        InputError: as for `read_weights`.
    """
    return read_weights(path, options.branch, Settings(num_heads=options.num_heads))


def check_counts(options: argparse.Namespace, names: Sequence[str], least: int = 1) -> None:
    """Refuse numbers that are too small; what is absent or None passes.

    Args:
        options: of the command line.
        names: of its numbers, as Python has them: batch_size.
        least: the smallest that can be meant.

    Raises:
        InputError: one is smaller.
    """
    for name in names:
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')}: must be at least {least}")
