"""The command line of a training run. Torch is imported only when training starts."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.command_line import Parser, exit_status
from pretrain.config.checks import warnings
from pretrain.config.load import config_text, load_config
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.processes import let_threads_sleep
from pretrain.ranks import SINGLE, detect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the process's exit status. Wrong input: one line on stderr and 2."""
    rank = _rank()
    return exit_status(f"pretrain: rank {rank}" if rank else "pretrain", lambda: _run(_parse(arguments)))


def _rank() -> int:
    """This process's rank, as far as can be told: training itself refuses variables that contradict."""
    try:
        return detect(os.environ).rank
    except InputError:
        return SINGLE.rank


def _run(options: argparse.Namespace) -> int:
    cfg = load_config(_existing(options.config), options.overrides)
    if options.print_config:
        print(config_text(cfg), end="")
        return 0
    for line in warnings(cfg) if _rank() == 0 else []:
        print(f"pretrain: warning: {line}", file=sys.stderr)
    return _dry_run(cfg) if options.dry_run else _train(cfg)


def _dry_run(cfg: Config) -> int:
    let_threads_sleep()
    from pretrain import dry_run

    return dry_run.dry_run(cfg)


def _train(cfg: Config) -> int:
    let_threads_sleep()
    from pretrain import train  # torch takes seconds to import

    return train.main(cfg)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand before, between and after the overrides."""
    parser = Parser(
        prog="python -m pretrain",
        description="Pretrain a vision transformer; a run whose folder exists is continued.",
        epilog="Every setting is listed in docs/configuration.md.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, for example configs/demo.yaml")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings to change, such as optim.lr=0.001",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build the run, time three steps on noise, write nothing"
    )
    parser.add_argument("--print-config", action="store_true", help="print the complete config and stop")
    return parser.parse_intermixed_args(arguments)


def _existing(name: str) -> Path:
    """The config file; a name that does not exist is answered with the config that it resembles."""
    path = Path(name)
    if path.exists():
        return path
    known = {config.stem: str(config) for config in sorted(Path("configs").glob("*.yaml"))}
    near = difflib.get_close_matches(path.stem, known, n=1)
    raise InputError(f"{path}: no such file" + (f"; did you mean {known[near[0]]}?" if near else ""))
