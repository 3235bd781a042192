"""Does this installation train as recorded? Every recipe at toy size, each loss beside the recorded one.

    python tools/smoke.py                    # all recipes, a minute; `make smoke`
    python tools/smoke.py --only vitl_rmlp
    python tools/smoke.py --write            # record, after a change that is meant to change results

Each recipe of configs/ trains by `pretrain.train.main` for ten steps on scikit-learn's digits, in fp32 on one
thread of the CPU: `pretrain/config/toy.py` shrinks what costs, all else is the recipe's. A recipe of a second
phase starts from a backbone that configs/demo.yaml trains first, likewise. All is written to runs/smoke/.
Exit status 1: a loss differs from configs/expected_curves.json by more than the tolerance.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pretrain import train
from pretrain.command_line import Parser, exit_status
from pretrain.config.derived import uses_rmlp
from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.config.toy import STEPS, first_phase_overrides, toy_overrides
from pretrain.data.digits import write_digits
from pretrain.errors import InputError
from pretrain.run.durable import write_text

CONFIGS = Path(__file__).parents[1] / "configs"
RECORDED = CONFIGS / "expected_curves.json"
WORK = Path("runs/smoke")
NO_RECIPES = {
    "base": "holds what recipes share",
    "rmlp_phase": "is the second half of vitl_rmlp and vitg_rmlp",
}
# Of a loss, or absolute below 1. Between SSE and AVX-512 kernels, losses of trainable heads differed by 1e-6
# at most in ten steps, those of randomized heads by 6e-4. A weight decay without its schedule changes 3e-4.
TOLERANCE = 1e-4
TOLERANCE_RANDOMIZED = 5e-3
DECIDING = ("torch", "numpy", "pillow", "opencv-python-headless", "scikit-learn")  # packages, for the curves

Curves = Mapping[str, Sequence[float | None]]  # by loss term, one value a step; None: not finite


class Difference(NamedTuple):
    """One loss that is not the recorded one."""

    step: int  # of the run, from 1
    term: str
    here: float | None
    recorded: float | None
    size: float  # relative


@dataclass(frozen=True)
class Outcome:
    """A recipe's run beside its record."""

    recipe: str
    curves: Curves
    recorded: Curves
    tolerance: float
    largest: float  # difference of all
    first: Difference | None  # that is larger than the tolerance


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="smoke.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings of every run")
    parser.add_argument("--only", metavar="NAME", choices=recipes(), help="one recipe")
    parser.add_argument("--write", action="store_true", help=f"record the curves in {RECORDED.name}")
    options = parser.parse_intermixed_args(arguments)
    if options.write and options.overrides:
        raise InputError("command line: --write records the recipes as they are; leave the settings out")
    return options


def recipes() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in NO_RECIPES)


def curves_of(recipe: str, overrides: Sequence[str]) -> Curves:
    """Train a recipe at toy size; its loss terms.

    Raises:
        InputError: it cannot be trained; the line names the recipe.
    """
    try:
        path = CONFIGS / f"{recipe}.yaml"
        cfg = load_config(path)
        start = [f"model.init_from={first_phase(recipe, cfg)}"] if cfg.model.init_from else []
        return run(path, WORK / recipe, [*toy_overrides(cfg, shards()), *start, *overrides])
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from error


def first_phase(recipe: str, cfg: Config) -> Path:
    """The backbone that a recipe of a second phase starts from: its own model, trained by demo.yaml."""
    path, folder = CONFIGS / "demo.yaml", WORK / f"{recipe}_first_phase"
    run(path, folder, [*toy_overrides(load_config(path), shards()), *first_phase_overrides(cfg)])
    return folder / "exports" / f"teacher_step_{STEPS:08d}.safetensors"


def shards() -> str:
    """The digits' training shards."""
    return f"{WORK}/digits/train-*.tar"


def run(config: Path, folder: Path, settings: Sequence[str]) -> Curves:
    """Train in a fresh folder; what it prints goes into a file beside it.

    Raises:
        InputError: the config, or what it names, cannot be used.
        SystemExit: the run was stopped, with its status.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("w") as log, redirect_stdout(log):
        status = train.main(load_config(config, [*settings, f"run.dir={folder}"]))
    if status:
        raise SystemExit(status)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {term: [line[term] for line in lines] for term in lines[0] if term.startswith("loss/")}


def compare(recipe: str, curves: Curves, recorded: Curves) -> Outcome:
    """A run beside its record, step by step; terms or steps that one of them lacks differ."""
    found = list(differences(curves, recorded))
    allowed = tolerance(recipe)
    wrong = [difference for difference in found if difference.size > allowed]
    largest = max((difference.size for difference in found), default=math.inf)
    return Outcome(recipe, curves, recorded, allowed, largest, min(wrong, default=None))


def tolerance(recipe: str) -> float:
    """Of a recipe's losses: randomized heads amplify rounding."""
    return TOLERANCE_RANDOMIZED if uses_rmlp(load_config(CONFIGS / f"{recipe}.yaml")) else TOLERANCE


def differences(curves: Curves, recorded: Curves) -> Iterator[Difference]:
    """Every value beside the recorded one."""
    for term in sorted({*curves, *recorded}):
        pairs = zip_longest(*(found.get(term, ()) for found in (curves, recorded)))
        for step, (mine, theirs) in enumerate(pairs, start=1):
            yield Difference(step, term, mine, theirs, _distance(mine, theirs))


def _distance(here: float | None, recorded: float | None) -> float:
    """Relative to the recorded value, or absolute where that is below 1: KoLeo passes through 0."""
    if here is None or recorded is None:
        return math.inf
    return abs(here - recorded) / max(abs(recorded), 1)


def table(outcomes: Sequence[Outcome]) -> Table:
    """Every recipe's loss at its ends, and how far it is from the record."""
    shown = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"loss in {STEPS} steps, and how far a term is from the recorded one",
    )
    shown.add_column("recipe", no_wrap=True)
    for heading in ("first", "last", "recorded", "apart", "allowed"):
        shown.add_column(heading, justify="right")
    shown.add_column(no_wrap=True)
    for outcome in outcomes:
        losses, recorded = (found.get("loss/total", [None]) for found in (outcome.curves, outcome.recorded))
        ends = [_number(value, 3) for value in (losses[0], losses[-1], recorded[-1])]
        verdict = "[red]NOT" if outcome.first else "as recorded"
        shown.add_row(outcome.recipe, *ends, f"{outcome.largest:.1e}", f"{outcome.tolerance:g}", verdict)
    return shown


def _number(value: float | None, digits: int = 4) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def explain(outcome: Outcome) -> str:
    """One line on a recipe whose curve is not the recorded one: where, and what that means."""
    assert outcome.first is not None
    if not outcome.recorded:
        return f"{outcome.recipe}: no curve is recorded; do so with --only {outcome.recipe} --write"
    step, term, here, recorded, size = outcome.first
    place = f"{outcome.recipe}: NOT as recorded from step {step} on"
    values = f"{term} {_number(here)}, recorded {_number(recorded)}, {size:.1e} apart"
    untrained = "nothing is learnt by then: the data, the initial weights or a forward differ"
    trained = "the losses before it agree: a gradient, the optimizer or a schedule differs"
    return f"{place} ({values}); {untrained if step <= 2 else trained}"  # the learning rate starts at 0


def advice(outcomes: Sequence[Outcome], versions: Mapping[str, str]) -> str:
    """What to do about curves that differ."""
    here = installed()
    other = [
        f"{name} {here[name]} ({versions[name]})" for name in versions if versions[name] != here.get(name)
    ]
    packages = f"Other packages than recorded with: {', '.join(other)}; " if other else ""
    first = next(outcome.recipe for outcome in outcomes if outcome.first)
    return (
        f"{packages or 'The packages are those recorded with; '}`make setup` installs the tested ones. "
        f"In a report, send config.yaml, environment.txt and metrics.jsonl of {WORK / first}."
    )


def installed() -> dict[str, str]:
    """The versions of the packages that make pixels, draws and sums, without the device that they are for."""
    return {name: version(name).partition("+")[0] for name in DECIDING}


def record(curves: Mapping[str, Curves]) -> None:
    """Write curves into the record, one line a term; those of other recipes stay, of removed ones go."""
    before = json.loads(RECORDED.read_text())["curves"] if RECORDED.exists() else {}
    found: dict[str, Curves] = {**before, **curves}
    merged = {name: found[name] for name in recipes() if name in found}
    rows = [f'    "{name}": {{\n{_rows(terms)}\n    }}' for name, terms in merged.items()]
    body = ",\n".join(rows)
    write_text(RECORDED, f'{{\n  "versions": {json.dumps(installed())},\n  "curves": {{\n{body}\n  }}\n}}\n')


def _rows(curves: Curves) -> str:
    rounded = {term: [value and float(f"{value:.6g}") for value in found] for term, found in curves.items()}
    return ",\n".join(f'      "{term}": {json.dumps(found)}' for term, found in rounded.items())


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, print; 0, or 1 when a curve is not the recorded one."""
    options, console = parse(arguments), Console()
    torch.set_num_threads(1)  # so small a model is fastest so, and sums keep one order
    if not (WORK / "digits" / "test-000000.tar").exists():
        write_digits(WORK / "digits")
    document: dict[str, Any] = json.loads(RECORDED.read_text()) if not options.write else {}
    found: dict[str, Curves] = {}
    for recipe in [options.only] if options.only else recipes():
        console.print(f"training {recipe}", highlight=False)
        found[recipe] = curves_of(recipe, options.overrides)
    if options.write:
        record(found)
        console.print(f"recorded {len(found)} recipes in {RECORDED}", highlight=False, soft_wrap=True)
        return 0
    recorded = document["curves"]
    outcomes = [compare(recipe, curves, recorded.get(recipe, {})) for recipe, curves in found.items()]
    return report(outcomes, document["versions"], console)


def report(outcomes: Sequence[Outcome], versions: Mapping[str, str], console: Console) -> int:
    """The table, a line for each curve that differs, what to do; the exit status."""
    console.print(table(outcomes))
    skipped = "; ".join(f"{name}.yaml {reason}" for name, reason in NO_RECIPES.items())
    console.print(f"not recipes of their own: {skipped}", highlight=False, soft_wrap=True)
    wrong = [outcome for outcome in outcomes if outcome.first]
    for outcome in wrong:
        print(f"smoke.py: {explain(outcome)}", file=sys.stderr)
    if wrong:
        print(f"smoke.py: {advice(wrong, versions)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(exit_status("smoke.py", main))
