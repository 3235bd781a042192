"""The command line of tools/sinder.py."""

import argparse
import math
from pathlib import Path

from pretrain.analysis.options import IMAGES, WEIGHTS, add_model_options, add_report_options, check_counts
from pretrain.analysis.page import check_page
from pretrain.command_line import Parser
from pretrain.errors import InputError
from pretrain.sinder.registers_file import RegistersOrder
from pretrain.sinder.repair import RepairSettings
from pretrain.sinder.repair_file import RepairOrder

DEFAULTS, METHOD, REGISTERS = RepairOrder(Path()), RepairSettings(), RegistersOrder(Path())
COUNTS = (
    *("size", "batch_size", "number", "window", "max_images", "check_every", "held_out"),
    *("limit_layers", "least"),
)


def parse(arguments: list[str], description: str) -> argparse.Namespace:
    """The command line; its verb is `verb`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="sinder.py", description=description, formatter_class=raw, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    verb = verbs.add_parser("diagnose", help="are there defects, where, and how many", allow_abbrev=False)
    verb.add_argument("sources", metavar="CKPT", type=Path, nargs=1, help=WEIGHTS)
    verb.add_argument("--images", metavar="SRC", help=IMAGES)
    verb.add_argument("--number", type=int, default=16, help="images to look at; default 16")
    verb.add_argument("--biases", action="store_true", help="predict with biases too (homogeneous variant)")
    verb.add_argument("--json", action="store_true", help="print JSON")
    _add_common(verb)
    verb = verbs.add_parser("repair", help="train singular values until they are gone", allow_abbrev=False)
    verb.add_argument("sources", metavar="CKPT", type=Path, nargs=1, help=WEIGHTS)
    _add_repair(verb)
    _add_common(verb)
    verb = verbs.add_parser("registers", help="a test-time register instead of a repair", allow_abbrev=False)
    verb.add_argument("sources", metavar="CKPT", type=Path, nargs=1, help=WEIGHTS)
    _add_registers(verb)
    _add_common(verb)
    verb = verbs.add_parser("compare", help="copies of one model on the same images", allow_abbrev=False)
    _add_compare(verb)
    _add_common(verb)
    return parser.parse_args(arguments)


def _add_common(verb: argparse.ArgumentParser) -> None:
    add_report_options(verb)
    add_model_options(verb, "of the order of the images")


def _add_compare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("sources", metavar="CKPT", type=Path, nargs="+", help="the original, then copies")
    verb.add_argument("--images", metavar="SRC", required=True, help=IMAGES)
    verb.add_argument("--number", type=int, default=16, help="images to look at; default 16")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--masks", metavar="DIR", type=Path, help="NAME.png of classes for each image")
    verb.add_argument("--knn-train", metavar="SHARDS", nargs="+", default=[], help="labelled, for k-NN")
    verb.add_argument("--knn-test", metavar="SHARDS", nargs="+", default=[], help="likewise")


def _add_repair(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--images", metavar="SRC", required=True, help=IMAGES)
    verb.add_argument("--out", type=Path, required=True, help="where the repaired weights go")
    verb.add_argument("--log", metavar="DIR", type=Path, help="a new folder, for TensorBoard")
    criterion = METHOD.criterion
    numbers = (
        ("--lr", METHOD.lr, "of SGD"),
        ("--limit-layers", criterion.limit_layers, "blocks that a defect may change, its own the last"),
        ("--least", criterion.least, "defective patches that make an image count"),
        ("--max-images", METHOD.max_images, "images to train on, again and again where there are fewer"),
        ("--window", METHOD.window, "last images that --stop-share looks at"),
        ("--stop-share", METHOD.stop_share, "of them without defects: done"),
        ("--held-out", DEFAULTS.held_out, "images that are never trained on"),
        ("--check-every", DEFAULTS.check_every, "images between looks at the held-out ones"),
        ("--min-cls-cosine", DEFAULTS.min_cls_cosine, "of class tokens with the original's: else it stops"),
        ("--min-patch-cosine", DEFAULTS.min_patch_cosine, "of clean patches, likewise"),
    )
    for name, default, text in numbers:
        verb.add_argument(name, type=type(default), default=default, help=f"{text}; default {default:g}")
    verb.add_argument("--bf16", action="store_true", help="blocks in bfloat16")


def _add_registers(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--images", metavar="SRC", required=True, help=IMAGES)
    verb.add_argument("--out", type=Path, required=True, help="where the export goes: *.safetensors")
    verb.add_argument("--hook", type=Path, metavar="FILE.py", help="also write a hook for transformers")
    verb.add_argument("--neurons", type=int, help="how many; default: the fewest of a ladder that do")
    verb.add_argument("--last-block", type=int, help="of the neurons; default: the first defective one")
    numbers = (
        ("--number", REGISTERS.number, "images to find neurons on"),
        ("--held-out", REGISTERS.held_out, "other images, for all figures"),
        ("--min-cls-cosine", REGISTERS.min_cls_cosine, "of class tokens with the original's: else not taken"),
        ("--min-patch-cosine", REGISTERS.min_patch_cosine, "of clean patches, likewise"),
    )
    for name, default, text in numbers:
        verb.add_argument(name, type=type(default), default=default, help=f"{text}; default {default:g}")


def check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read.

    Raises:
        InputError: a number is out of its range, or the report exists.
    """
    check_counts(options, COUNTS)
    if not 0 < getattr(options, "lr", METHOD.lr) < math.inf:
        raise InputError(f"--lr: {options.lr:g} must be above 0")
    if not 0 < getattr(options, "stop_share", METHOD.stop_share) <= 1:
        raise InputError(f"--stop-share: {options.stop_share:g} must be above 0, and 1 at most")
    for name in ("min_cls_cosine", "min_patch_cosine"):
        if not -1 <= getattr(options, name, 0.0) <= 1:
            raise InputError(f"--{name.replace('_', '-')}: a cosine is from -1 to 1")
    if options.report:
        check_page(options.report, options.force)
