"""Do randomized heads adapt a backbone better than trainable ones? One checkpoint, many settings, seeds.

    python benchmarks/rmlp_study.py --shards data/cifar10 --results study.md

A small ViT is trained on DIR/train-*.tar with MLP heads (configs/demo.yaml). From its teacher every setting
goes on for the same steps on corrupted copies of the images (contrast, noise, blur in turns, made here),
which it has not met; then settings that start from random weights. Each run is `python -m pretrain`, so that
the product itself is measured. Teachers are judged on held-out images, clean and corrupted, by accuracy and
by what interpretability can be in numbers. Started again, it goes on where it was stopped. The last line is
one JSON object.
"""

import argparse
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from arguments import at_least
from PIL import Image
from rmlp_study_measures import Judge
from rmlp_study_report import Results, document, draw, markdown

from pretrain.analysis.corruptions import SEVERITIES, Corruption, CorruptionName, corrupt
from pretrain.command_line import Parser, exit_status
from pretrain.data.decode import decode
from pretrain.data.order import Order
from pretrain.data.reader import Reader
from pretrain.data.shards import list_shards
from pretrain.data.writer import PackedSample, write_shards
from pretrain.errors import InputError
from pretrain.run.durable import write_text

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS: tuple[CorruptionName, ...] = ("contrast", "gaussian_noise", "motion_blur")  # in turns
COLOUR = ("flip_probability=0.5", "saturation=0.2", "hue=0.1", "grayscale_probability=0.2")
ANCHOR = {"rmlp.amplitude": "5", "loss.koleo_weight": "0.5", "optim.lr": "1e-4", "optim.min_lr": "1e-4"}
STUDY = "study.json"  # in the folder of a study: what its runs depend on
MIX = ("dino_head.kind=mix", "dino_head.prototypes=4096")


@dataclass(frozen=True)
class Setting:
    """One row of the table: what differs from the anchor, R_5 heads with independent draws."""

    name: str
    config: str  # of configs/
    changes: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """The anchor's values, then what differs."""
        return [*(f"{key}={value}" for key, value in ANCHOR.items()), *self.changes]


def _lr(value: str) -> tuple[str, ...]:
    return (f"optim.lr={value}", f"optim.min_lr={value}")


RMLP, MLP = "demo_rmlp.yaml", "demo.yaml"
FIRM = ("teacher.momentum=0.994", "teacher.final_momentum=0.994", "teacher.temp=0.04", "optim.warmup_steps=0")
ADAPTED = (
    Setting("MLP", MLP, FIRM),
    Setting("MLP, backbone still for 20 steps", MLP, (*FIRM, "optim.freeze_backbone_steps=20")),
    Setting("RMLP a = 5", RMLP),
    Setting("RMLP a = 0", RMLP, ("rmlp.amplitude=0",)),
    Setting("RMLP a = 1", RMLP, ("rmlp.amplitude=1",)),
    Setting("RMLP a = 5, shared draws", RMLP, ("rmlp.share_student_teacher=true",)),
    Setting("RMLP a = 20, shared draws", RMLP, ("rmlp.amplitude=20", "rmlp.share_student_teacher=true")),
    Setting("RMLP a = 5, one draw", RMLP, ("rmlp.resample_every=0",)),
    Setting("MLP and RMLP mixed", RMLP, MIX),
    Setting("RMLP, KoLeo 0.1", RMLP, ("loss.koleo_weight=0.1",)),
    Setting("RMLP, KoLeo 1.0", RMLP, ("loss.koleo_weight=1.0",)),
    Setting("RMLP, rate 1e-5", RMLP, _lr("1e-5")),
    Setting("RMLP, rate 1e-3", RMLP, _lr("1e-3")),
    Setting("MLP, rate 1e-5", MLP, (*FIRM, *_lr("1e-5"))),
    Setting("MLP, rate 1e-3", MLP, (*FIRM, *_lr("1e-3"))),
)
SCRATCH = (
    Setting("MLP, KoLeo 0.1", MLP, ("loss.koleo_weight=0.1", "optim.lr=4e-3")),
    Setting("RMLP, KoLeo 0.5", RMLP, _lr("1e-3")),
    Setting("RMLP, KoLeo 1.0", RMLP, ("loss.koleo_weight=1.0", *_lr("1e-3"))),
    Setting(
        "RMLP, shared draws, KoLeo 1.0",
        RMLP,
        ("loss.koleo_weight=1.0", "rmlp.share_student_teacher=true", *_lr("1e-3")),
    ),
)


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="rmlp_study.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--shards", type=Path, required=True, metavar="DIR", help="labelled train-*.tar and test-*.tar")
    add("--work", type=Path, default=Path("runs/rmlp_study"), help="folder of copies and runs")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs that adapt; default 0 1 2")
    for name, default, text in (
        ("--first-steps", 300, "of the common checkpoint, and from scratch"),
        ("--steps", 60, "of each adaptation"),
        ("--train-images", 4000, "that are adapted to and probed"),
        ("--test-images", 2000, "that judge"),
        ("--patch-size", 4, "pixels; 8 takes a quarter of the time"),
    ):
        add(name, type=at_least(1), default=default, help=f"{text}; default {default}")
    add("--severity", type=int, choices=SEVERITIES, default=3, help="of the corruptions; default 3")
    add("--only", metavar="NAME", nargs="+", help="settings by name; default: all")
    add("--results", type=Path, metavar="FILE.md", help="the table; a picture goes beside it")
    options = parser.parse_args()
    known = [setting.name for setting in (*ADAPTED, *SCRATCH)]
    for name in options.only or []:
        if name not in known:
            raise InputError(f"--only: {name!r} is none of: {'; '.join(known)}")
    return options


def deciding(options: argparse.Namespace) -> dict[str, str | int]:
    """What the runs and measures of a folder depend on."""
    names = ("first_steps", "steps", "train_images", "test_images", "patch_size", "severity")
    return {"shards": str(options.shards.resolve()), **{name: getattr(options, name) for name in names}}


def refuse_other_study(options: argparse.Namespace) -> None:
    """Runs of other settings would be taken for those that are asked for.

    Raises:
        InputError: the folder holds a study with other settings.
    """
    path = options.work / STUDY
    known = json.loads(path.read_text()) if path.exists() else deciding(options)
    changed = [
        f"--{name}".replace("_", "-") for name, value in deciding(options).items() if known[name] != value
    ]
    if changed:
        fault = f"{options.work} holds a study with other {', '.join(changed)}"
        raise InputError(f"--work: {fault}; choose another folder")


def corrupted_copies(options: argparse.Namespace, split: str, number: int) -> str:
    """Shards of the first images, one corruption after the other; made once; their pattern."""
    folder = options.work / f"corrupted_{options.severity}_{split}_{number}"
    pattern = f"{folder}/{split}-*.tar"
    if not (folder / "complete").exists():
        write_shards(_copies(options, split, number), folder, split, 1000)
        write_text(folder / "complete", "")
    return pattern


def _copies(options: argparse.Namespace, split: str, number: int) -> Iterator[PackedSample]:
    reader = Reader(list_shards([f"{options.shards}/{split}-*.tar"], "--shards"))
    stored = Order(reader.sizes, seed=0, shuffle="none", open_shards=1)
    if len(stored) < number:
        raise InputError(f"--shards: {options.shards} holds {len(stored)} {split} images, not {number}")
    for position in range(number):
        sample = stored.at(position)
        item = reader.read(sample.shard, sample.index)
        kind = Corruption(KINDS[position % len(KINDS)], options.severity)
        file = io.BytesIO()
        Image.fromarray(corrupt(decode(item.image), kind, item.key)).save(file, "PNG")
        yield PackedSample(item.key, "png", file.getvalue(), item.label, {"corruption": str(kind)})


def train(folder: Path, config: str, steps: int, settings: Sequence[str]) -> Path:
    """Run to the end, unless it is there already; the teacher's backbone.

    Raises:
        SystemExit: the run failed, with its status.
    """
    export = folder / "exports" / f"teacher_step_{steps:08d}.safetensors"
    if export.exists():
        return export
    common = ["data.group_size=64", "optim.global_batch_size=64", "data.workers=0"]
    common += [f"data.augment.{change}" for change in COLOUR] + [
        "log.knn.train=[]",
        "log.knn.test=[]",
        "checkpoint.every=100000",
    ]
    command = [sys.executable, "-m", "pretrain", str(CONFIGS / config), f"run.dir={folder}"]
    command += [f"run.steps={steps}", *common, *settings]
    print(f"$ python {shlex.join(command[1:])}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if status:
        print(f"rmlp_study.py: {folder}: ended with status {status}; see {log.name}", file=sys.stderr)
        raise SystemExit(status)
    return export


def study(options: argparse.Namespace) -> Results:
    """Every setting with every seed, judged."""
    domain = corrupted_copies(options, "train", options.train_images)
    judged = corrupted_copies(options, "test", options.test_images)
    write_text(options.work / STUDY, json.dumps(deciding(options)) + "\n")
    clean = [f"{options.shards}/{split}-*.tar" for split in ("train", "test")]
    judge = Judge(
        {"corrupted": (domain, judged), "clean": (clean[0], clean[1])},
        options.train_images,
        options.test_images,
    )
    first_steps = options.first_steps
    patch = f"model.patch_size={options.patch_size}"
    first = train(options.work / "first", MLP, first_steps, [patch, f"data.shards={clean[0]}"])
    start, scratch = f"model.init_from={first}", "model.init_from="
    found: Results = {"before": {"common checkpoint": [judge(first)]}, "adapted": {}, "from scratch": {}}
    plans = (
        ("adapted", ADAPTED, options.steps, [patch, start, f"data.shards={domain}"]),
        ("from scratch", SCRATCH, first_steps, [patch, scratch, f"data.shards={clean[0]}"]),
    )
    for group, settings, steps, rest in plans:
        for setting in settings:
            if options.only and setting.name not in options.only:
                continue
            for seed in options.seeds:
                folder = options.work / group.replace(" ", "_") / f"{_slug(setting.name)}_{seed}"
                overrides = [*setting.overrides(), *rest, f"run.seed={seed}"]
                export = train(folder, setting.config, steps, overrides)
                found[group].setdefault(setting.name, []).append(judge(export))
    return found


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def main() -> int:
    """Study, report."""
    options = parse()
    refuse_other_study(options)
    torch.manual_seed(0)
    found = study(options)
    facts = {
        "seeds": options.seeds,
        "steps": options.steps,
        "first_steps": options.first_steps,
        "patch_size": options.patch_size,
        "train_images": options.train_images,
        "test_images": options.test_images,
        "corruptions": [f"{kind}:{options.severity}" for kind in KINDS],
    }
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        picture = options.results.with_suffix(".svg")
        picture.write_bytes(draw(found))
        write_text(options.results, markdown(found, facts, picture.name))
    print(markdown(found, facts))
    print(json.dumps(document(found, facts)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("rmlp_study.py", main))
