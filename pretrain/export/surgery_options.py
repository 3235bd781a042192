"""The command line of tools/surgery.py."""

import argparse
import math
from pathlib import Path
from typing import Any, get_args

from pretrain.command_line import Parser
from pretrain.surgery.conversion import Target
from pretrain.surgery.layouts import DEFAULT_CHUNKS

DTYPES = ("float32", "bfloat16", "float16")


def parse_verb(arguments: list[str], description: str) -> argparse.Namespace:
    """The command line; its verb is `verb`.

    Raises:
        InputError: it is wrong.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="surgery.py", description=description, formatter_class=raw, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    _add_looks(verbs)
    _add_changes(verbs)
    _add_combinations(verbs)
    return parser.parse_args(arguments)


def _verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    return verb


def _add_settings(verb: argparse.ArgumentParser) -> None:
    """What sources may not tell of the backbone that is read."""
    verb.add_argument("--num-heads", type=int, help="attention heads, where the source does not tell")
    verb.add_argument("--offset", type=float, help="of position interpolation: 0.1, or 0 with registers")
    verb.add_argument("--antialias", choices=["true", "false"], help="of position interpolation")
    verb.add_argument("--grid", type=_size, metavar="ROWSxCOLUMNS", help="of positions, where not square")


def _add_branch(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--branch", metavar="NAME", help="student, teacher (the default), model_ema, ...")


def _add_target(verb: argparse.ArgumentParser, text: str = "*.safetensors or *.pth") -> None:
    verb.add_argument("--out", type=Path, required=True, help=text)
    verb.add_argument("--force", action="store_true", help="replace what is there")


def _add_loss(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--allow-loss", action="store_true", help="write although something is lost")


def _changing(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A verb that reads one source and writes what it made of it."""
    verb = _verb(verbs, name, text)
    verb.add_argument("source", metavar="FILE", type=Path, help="a file or folder of any known format")
    for add in (_add_branch, _add_settings, _add_target, _add_loss):
        add(verb)
    return verb


def _add_looks(verbs: Any) -> None:
    verb = _verb(verbs, "inspect", "Format, architecture, every tensor, and what is suspicious.")
    verb.add_argument("source", metavar="FILE", type=Path, help="a file or folder of any known format")
    verb.add_argument("--no-spectral", action="store_true", help="leave out spectral norms, the slow part")
    _add_look(verb)
    text = "Do two backbones have the same architecture, tensors and features? Status 1: no."
    _add_pair(_verb(verbs, "diff", text), tolerance=0.0)
    text = "Do two formats of one model compute the same features? Status 1: no."
    _add_pair(_verb(verbs, "verify", text), tolerance=1e-5)


def _add_pair(verb: argparse.ArgumentParser, tolerance: float) -> None:
    verb.add_argument("a", metavar="A", type=Path)
    verb.add_argument("b", metavar="B", type=Path)
    text = f"relative; default {tolerance:g}"
    verb.add_argument("--tolerance", type=_tolerance, default=tolerance, help=text)
    _add_look(verb)


def _add_look(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON")
    _add_branch(verb)
    _add_settings(verb)


def _add_changes(verbs: Any) -> None:
    verb = _changing(verbs, "convert", "Write a backbone in another format.")
    verb.add_argument("--to", choices=get_args(Target), required=True, help="huggingface and timm: a folder")
    verb.add_argument("--chunks", type=int, help=f"of dinov2-chunked; default {DEFAULT_CHUNKS}")
    verb.add_argument("--split-swiglu", action="store_true", help="dinov2: w1 and w2 instead of w12")
    verb = _changing(verbs, "interpolate", "Learned positions for another image size.")
    verb.add_argument("--image-size", type=_size, required=True, metavar="PX or HxW")
    verb = _changing(verbs, "resize-patch", "Patch embedding for another patch size.")
    verb.add_argument("--patch-size", type=int, required=True, metavar="PX")
    verb = _changing(verbs, "channels", "Patch embedding for another number of channels.")
    verb.add_argument("--to", type=int, required=True, metavar="N")
    verb = _changing(verbs, "add-registers", "More register tokens, drawn as for training.")
    verb.add_argument("number", metavar="N", type=int)
    verb.add_argument("--seed", type=int, default=0, help="of the draw; default 0")
    verb = _changing(verbs, "drop-registers", "Fewer register tokens.")
    verb.add_argument("--keep", type=int, default=0, metavar="N", help="of the first; default 0")
    verb = _changing(verbs, "cast", "Another floating-point type.")
    verb.add_argument("--to", choices=DTYPES, required=True)


def _add_combinations(verbs: Any) -> None:
    verb = _verb(verbs, "extract", "The backbone of one branch of a checkpoint.")
    verb.add_argument("which", choices=["teacher", "student"])
    verb.add_argument("source", metavar="FILE", type=Path, help="a checkpoint of any known format")
    for add in (_add_settings, _add_target, _add_loss):
        add(verb)
    verb = _verb(verbs, "consolidate", "All tensors of a sharded checkpoint in one file.")
    verb.add_argument("source", metavar="FOLDER", type=Path, help="a sharded checkpoint of any engine")
    _add_target(verb, "*.safetensors")  # takes every tensor as it is: no branch, no settings, no loss
    verb = _verb(verbs, "average", "The average of several backbones.")
    verb.add_argument("sources", metavar="FILE", type=Path, nargs="+", help="for --ema the oldest first")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--weights", type=_floats, metavar="W,W,...", help="one a file; default: equal")
    text = "exponential moving average over the files"
    how.add_argument("--ema", type=float, metavar="MOMENTUM", help=text)
    for add in (_add_branch, _add_settings, _add_target, _add_loss):
        add(verb)


def _size(text: str) -> tuple[int, int]:
    """`518` or `224x448`."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 518 or 224x448")
    return int(parts[0]), int(parts[-1])


def _tolerance(text: str) -> float:
    refusal = argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    try:
        value = float(text)
    except ValueError:
        raise refusal from None
    if not 0 <= value < math.inf:
        raise refusal
    return value


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 1,2,1") from None
