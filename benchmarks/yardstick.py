"""Does this installation train as it should? A small training on real images whose result is known.

    python benchmarks/yardstick.py --results benchmarks/results/2026-11-21-yardstick.md
    python benchmarks/yardstick.py --shards data/cifar10 --patch-size 4 --seeds 0 --steps 400

For each seed configs/demo.yaml (scikit-learn's digits, MLP heads) and, from its teacher, demo_rmlp.yaml
(randomized heads), both by `python -m pretrain`, so that the product itself is measured; `--method swav`
takes swav_demo.yaml and swav_demo_rmlp.yaml. With `--shards` the same model trains on DIR/train-*.tar and is
judged on DIR/test-*.tar, which need labels. Overrides reach every run. Started again, it continues where it
was stopped; what is finished is not run again. Exit status 1: the accuracy on the digits is more than the
margin below that of the original DINOv2 trainer.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from yardstick_report import Curve, Outcome, figures, markdown, passed, svg

from pretrain.command_line import Parser, exit_status
from pretrain.config.load import diff_configs, load_config
from pretrain.data.digits import write_digits
from pretrain.errors import InputError
from pretrain.run.durable import write_text

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {  # by method: with trainable heads, with randomized ones
    "dinov2": ("demo.yaml", "demo_rmlp.yaml"),
    "swav": ("swav_demo.yaml", "swav_demo_rmlp.yaml"),
}
STEPS, PATCH_SIZE = 300, 8  # of the setting that the original trainer was measured with


@dataclass(frozen=True)
class Phase:
    """One training run, given by what a user would type."""

    folder: Path
    config: Path
    steps: int
    overrides: list[str]

    @property
    def export(self) -> Path:
        """The teacher's backbone after the last step."""
        return self.folder / "exports" / f"teacher_step_{self.steps:08d}.safetensors"

    @property
    def settings(self) -> list[str]:
        """The overrides, folder and length included."""
        return [f"run.dir={self.folder}", f"run.steps={self.steps}", *self.overrides]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="yardstick.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings of every run")
    parser.add_argument("--method", choices=RECIPES, default="dinov2", help="default: dinov2")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2], metavar="A,B", help="default: 0,1,2")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"with MLP heads; default {STEPS}")
    parser.add_argument(
        "--rmlp-steps", type=int, default=60, help="with randomized heads, 0 = none; default 60"
    )
    parser.add_argument("--shards", type=Path, metavar="DIR", help="labelled train-*.tar and test-*.tar")
    parser.add_argument("--patch-size", type=int, default=PATCH_SIZE, help=f"pixels; default {PATCH_SIZE}")
    parser.add_argument("--knn-every", type=int, default=25, help="steps between points; default 25")
    parser.add_argument("--work", type=Path, help="folder of the runs; default: runs/yardstick...")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="Markdown; the curves go beside it as SVG"
    )
    options = parser.parse_intermixed_args(arguments)
    parts = ["yardstick"] if options.method == "dinov2" else ["yardstick", options.method]
    parts += [options.shards.resolve().name] if options.shards else []
    options.work = options.work or Path("runs") / "_".join(parts)
    return options


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} must be whole numbers with commas between them, as 0,1,2")
    return [int(part) for part in text.split(",")]


def phases(options: argparse.Namespace, seed: int) -> list[Phase]:
    """The runs of one seed, in order."""
    data, work = options.shards or options.work / "data", options.work
    common = [
        f"run.seed={seed}",
        f"model.patch_size={options.patch_size}",
        f"data.shards={data}/train-*.tar",
        f"log.knn.train={data}/train-*.tar",
        f"log.knn.test={data}/test-*.tar",
    ]
    every, (trained, randomized) = f"log.knn.every={options.knn_every}", RECIPES[options.method]
    first = Phase(
        work / f"seed_{seed}", CONFIGS / trained, options.steps, [*common, every, *options.overrides]
    )
    start = f"model.init_from={first.export}"
    second = Phase(
        work / f"seed_{seed}_rmlp",
        CONFIGS / randomized,
        options.rmlp_steps,
        [*common, start, *options.overrides],
    )
    return [first, second] if options.rmlp_steps else [first]


def complete(phase: Phase) -> Curve:
    """Run a phase to its end, unless it is there already; its k-NN scores.

    Raises:
        InputError: the folder holds a run of other settings, or its last scores are lost.
        SystemExit: the run failed or was stopped, with its status.
    """
    _refuse_others(phase)
    if not _finished(phase):
        _train(phase)
    if not _finished(phase):
        last = phase.folder / "checkpoints" / f"step_{phase.steps:08d}"
        raise InputError(f"{phase.folder}: its last scores are missing; remove {last} and start again")
    return read_curve(phase.folder)


def _refuse_others(phase: Phase) -> None:
    """A run that was started with other settings would be continued with these and belong to neither."""
    written = phase.folder / "config.yaml"
    if not written.exists():
        return
    changes = diff_configs(load_config(written), load_config(phase.config, phase.settings))
    if changes:
        raise InputError(
            f"{phase.folder}: was run with other settings ({'; '.join(changes)}); set another --work"
        )


def _finished(phase: Phase) -> bool:
    return phase.export.exists() and phase.steps in read_curve(phase.folder).scores


def _train(phase: Phase) -> None:
    """`python -m pretrain`, its output shown and kept in a file beside the run's folder."""
    command = [sys.executable, "-m", "pretrain", str(phase.config), *phase.settings]
    print(f"$ python {shlex.join(command[1:])}", flush=True)
    phase.folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        phase.folder.with_suffix(".log").open("a", buffering=1) as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                log.write(line)
        except BaseException:
            process.terminate()  # it saves what it has; leaving it alive would have two in one folder
            raise
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode  # as shells say it
    if status:
        print(f"yardstick.py: {phase.folder}: the run ended with status {status}", file=sys.stderr)
        raise SystemExit(status)


def read_curve(folder: Path) -> Curve:
    """What a run has logged: k-NN accuracy by step, images per second of its log lines, warnings."""
    path, log = folder / "metrics.jsonl", folder.with_suffix(".log")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    scores = {line["step"]: (line["knn/cls"], line["knn/patch_mean"]) for line in lines if "knn/cls" in line}
    warnings = log.read_text().count("WARNING:") if log.exists() else 0
    return Curve(scores, [line["images_per_s"] for line in lines if "images_per_s" in line], warnings)


def measure(options: argparse.Namespace) -> Outcome:
    """Run every phase of every seed."""
    if not options.shards:
        _pack_digits(options.work / "data")
    curves: dict[int, list[Curve]] = {}
    for seed in options.seeds:
        curves[seed] = [complete(phase) for phase in phases(options, seed)]
    as_original = not options.shards and not options.overrides and options.method == "dinov2"
    as_original = as_original and (options.steps, options.patch_size) == (STEPS, PATCH_SIZE)
    return Outcome(
        data=options.shards.resolve().name if options.shards else "scikit-learn digits",
        recipes=RECIPES[options.method],
        patch_size=options.patch_size,
        overrides=options.overrides,
        steps=options.steps,
        rmlp_steps=options.rmlp_steps,
        first={seed: runs[0] for seed, runs in curves.items()},
        second={seed: runs[1] for seed, runs in curves.items() if len(runs) > 1},
        as_original=as_original,
    )


def _pack_digits(folder: Path) -> None:
    if not (folder / "test-000000.tar").exists():
        print(f"packing scikit-learn's digits into {folder}", flush=True)
        write_digits(folder)


def main(arguments: list[str] | None = None) -> int:
    """Measure, report; 0, or 1 when the digits' accuracy is too low."""
    options = parse(arguments)
    outcome = measure(options)
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        chart = options.results.with_suffix(".svg")
        write_text(chart, svg(outcome))
        write_text(options.results, markdown(outcome, chart.name))
    print(markdown(outcome))
    print(json.dumps(figures(outcome)))
    return 0 if passed(outcome) else 1


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(exit_status("yardstick.py", main))
