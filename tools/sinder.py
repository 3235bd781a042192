"""Find and repair singular defects (SINDER, arXiv 2407.16826): patch tokens that grow along one direction.

    python tools/sinder.py diagnose dinov2_vitg14_pretrain.pth --images photos/
    python tools/sinder.py repair dinov2_vitg14_pretrain.pth --images photos/ --out repaired.pth
    python tools/sinder.py registers dinov2_vitl14_pretrain.pth --images photos/ --out with.safetensors

Weights of any format that tools/surgery.py reads; images from a folder or from shards ('data/train-*.tar').
`diagnose` says `clean`, `mild` or `defective` and why; without images only what the weights predict.
`repair` trains singular values alone, watches held-out images, and writes the weights in the form they had;
where there is nothing to repair it writes nothing. An interrupted repair goes on when the same command is
given again. `registers` changes no weight: an export gets a test-time register instead (arXiv 2506.08010).
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from pretrain.command_line import Parser, exit_status
from pretrain.errors import InputError
from pretrain.export.weights import Weights, read_weights
from pretrain.sinder.diagnosis import Diagnosis, diagnose
from pretrain.sinder.directions import LayerDirection, defect_directions
from pretrain.sinder.held_out import Measure
from pretrain.sinder.hits import Criterion
from pretrain.sinder.images import ImageSet
from pretrain.sinder.registers_file import RegistersOrder, registers_file
from pretrain.sinder.registers_report import report_parts
from pretrain.sinder.repair import RepairSettings, Step
from pretrain.sinder.repair_file import RepairOrder, RepairReport, build_backbone, repair_file
from pretrain.surgery.architecture import Settings

DEFAULTS, METHOD = RepairOrder(Path()), RepairSettings()
REGISTERS = RegistersOrder(Path())
out, errors = Console(highlight=False, markup=False, width=120), Console(stderr=True)
bars = Progress(console=errors, transient=True, disable=not errors.is_terminal)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="sinder.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("diagnose", help="are there defects, where, and how many", allow_abbrev=False)
    verb.set_defaults(run=run_diagnose)
    _add_common(verb)
    verb.add_argument("--images", metavar="SRC", help="a folder, or a pattern of shards")
    verb.add_argument("--number", type=int, default=16, help="images to look at; default 16")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb = verbs.add_parser("repair", help="train singular values until they are gone", allow_abbrev=False)
    verb.set_defaults(run=run_repair)
    _add_common(verb)
    _add_repair(verb)
    verb = verbs.add_parser("registers", help="a test-time register instead of a repair", allow_abbrev=False)
    verb.set_defaults(run=run_registers)
    _add_common(verb)
    _add_registers(verb)
    return parser.parse_args(arguments)


def _add_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", metavar="CKPT", type=Path, help="weights of any known format")
    verb.add_argument("--size", type=int, help="pixels of the images; default: those of the position grid")
    verb.add_argument("--batch-size", type=int, default=8, help="images at once; default 8")
    verb.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    verb.add_argument("--num-heads", type=int, help="attention heads, where the weights do not tell")
    verb.add_argument("--branch", metavar="NAME", help="student or teacher, where there are both")
    verb.add_argument("--seed", type=int, default=0, help="of the order of the images; default 0")


def _add_repair(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--images", metavar="SRC", required=True, help="a folder, or a pattern of shards")
    verb.add_argument("--out", type=Path, required=True, help="where the repaired weights go")
    verb.add_argument("--force", action="store_true", help="replace what is there")
    criterion = METHOD.criterion
    numbers = (
        ("--lr", METHOD.lr, "of SGD"),
        (
            "--limit-layers",
            criterion.limit_layers,
            "blocks that a defect may change, its own the last",
        ),
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
    verb.add_argument("--images", metavar="SRC", required=True, help="a folder, or a pattern of shards")
    verb.add_argument("--out", type=Path, required=True, help="where the export goes: *.safetensors")
    verb.add_argument("--hook", type=Path, metavar="FILE.py", help="also write a hook for transformers")
    verb.add_argument("--force", action="store_true", help="replace what is there")
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


COUNTS = ("batch_size", "number", "window", "max_images", "check_every", "held_out", "limit_layers", "least")


def _read(options: argparse.Namespace) -> tuple[Weights, list[LayerDirection]]:
    for name in (
        "batch_size",
        "number",
        "window",
        "max_images",
        "check_every",
        "held_out",
        "limit_layers",
        "least",
    ):
        if getattr(options, name, 1) < 1:
            raise InputError(f"--{name.replace('_', '-')}: must be at least 1")
    weights = read_weights(options.source, options.branch, Settings(num_heads=options.num_heads))
    task = bars.add_task("predicting directions", total=1 + max_block(weights))
    return weights, defect_directions(weights.state, weights.model, advance=lambda n: bars.advance(task, n))


def max_block(weights: Weights) -> int:
    """The last block's number."""
    return max(int(name.split(".")[1]) for name in weights.state if name.startswith("blocks."))


def _images(options: argparse.Namespace, weights: Weights) -> ImageSet:
    size, patch = options.size or weights.model.img_size, weights.model.patch_size
    if size < patch or size % patch:
        raise InputError(f"--size: {size} px is not a multiple of the patch size {patch}")
    if weights.model.in_channels != 3:
        raise InputError(
            f"{weights.path}: has {weights.model.in_channels} channels; only RGB is supported here"
        )
    return ImageSet(options.images, size)


def run_diagnose(options: argparse.Namespace) -> int:
    """Print a diagnosis."""
    weights, directions = _read(options)
    batches: list[torch.Tensor] = []
    if options.images:
        images = _images(options, weights)
        if len(images) < options.number:
            raise InputError(
                f"--images: {options.images} holds {len(images)}, {options.number} are asked for"
            )
        order = images.shuffled(options.seed)
        chosen = images.batch([order(place) for place in range(options.number)])
        for line in images.damaged:
            print(f"sinder.py: left out: {line}", file=sys.stderr)
        if chosen is None:
            raise InputError(f"--images: all of them are damaged, as {images.damaged[0]}")
        batches = list(chosen.split(options.batch_size))
    backbone = build_backbone(weights, torch.device(options.device))
    found = diagnose(backbone, directions, batches)
    if options.json:
        print(json.dumps(_document(found, directions), indent=1))
    else:
        _print_diagnosis(found, directions)
    return 0


def _document(found: Diagnosis, directions: list[LayerDirection]) -> dict[str, Any]:
    layers = []
    for index, direction in enumerate(directions):
        facts = asdict(direction)
        facts["direction"] = direction.direction.tolist()
        seen = asdict(found.layers[index]) if found.layers else {}
        layers.append({"block": index, **facts, **seen})
    share = found.map.tolist() if found.map is not None else None
    head = {"verdict": found.verdict, "reason": found.reason, "first_block": found.first_layer}
    return {**head, "images": found.images, "map": share, "layers": layers}


def _print_diagnosis(found: Diagnosis, directions: list[LayerDirection]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("block", "gain", "gap", "growth", "growth gap"):
        table.add_column(name, justify="right")
    for name in ("by angle %", "by norm %", "both %", "times as long", "to prediction", "between images"):
        if found.layers:
            table.add_column(name, justify="right")
    for index, layer in enumerate(directions):
        row = [f"{index}", f"{layer.gain:.2f}", f"{layer.gain_gap:.2f}"]
        row += [f"e^{layer.log_growth:.1f}", f"{layer.growth_gap:.2f}"]
        if found.layers:
            seen = found.layers[index]
            row += [f"{100 * share:.2f}" for share in (seen.by_angle, seen.by_norm, seen.by_both)]
            row += [f"{seen.norm_ratio:.1f}", f"{seen.predicted_cosine:.2f}", f"{seen.between_images:.2f}"]
        table.add_row(*row)
    out.print(table)
    print(f"{found.verdict}: {found.reason}")


def run_repair(options: argparse.Namespace) -> int:
    """Repair, and say what changed."""
    weights, directions = _read(options)
    settings = RepairSettings(
        Criterion(least=options.least, limit_layers=options.limit_layers),
        lr=options.lr,
        batch_size=options.batch_size,
        max_images=options.max_images,
        stop_share=options.stop_share,
        window=options.window,
        bf16=options.bf16,
        seed=options.seed,
    )
    order = RepairOrder(
        options.out,
        sys.argv[1:],
        options.force,
        options.held_out,
        options.check_every,
        options.min_cls_cosine,
        options.min_patch_cosine,
        options.device,
    )
    task = bars.add_task("repairing", total=options.max_images)
    report = repair_file(weights, directions, _images(options, weights), settings, order, _watch(task))
    _print_report(options.out, report)
    return 0


def _watch(task: TaskID) -> Any:
    def watch(step: Step, measure: Measure | None) -> None:
        text = f"{step.defective_patches} defective patches, {100 * step.clean_share:.0f} % of images clean"
        bars.update(task, completed=step.images, description=text)
        if measure is not None:
            cosines = f"class token {measure.cls_cosine:.4f}, clean patches {measure.patch_cosine:.4f}"
            share = 100 * max(measure.shares)
            print(
                f"{step.images} images: {share:.2f} % defective held-out patches, {cosines}", file=sys.stderr
            )

    return watch


def _print_report(path: Path, report: RepairReport) -> None:
    print(f"before: {report.verdict_before}: {report.reason_before}")
    for line in report.damaged_images:
        print(f"left out: {line}")
    if report.before is None or report.after is None:
        print("nothing to repair, nothing written")
        return
    table = Table("", "before", "after", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, (first, last) in enumerate(zip(report.before.shares, report.after.shares, strict=True)):
        table.add_row(f"defective patches after block {index}", f"{100 * first:.2f} %", f"{100 * last:.2f} %")
    table.add_row("class token, cosine to the original", "", f"{report.after.cls_cosine:.4f}")
    table.add_row("clean patches, cosine to the original", "", f"{report.after.patch_cosine:.4f}")
    out.print(table)
    print(f"{path}: {report.outcome} after {report.images} images; now {report.verdict_after}")


def run_registers(options: argparse.Namespace) -> int:
    """Find register neurons, and say what they do."""
    weights, directions = _read(options)
    order = RegistersOrder(
        options.out,
        options.hook,
        sys.argv[1:],
        options.force,
        options.neurons,
        options.last_block,
        options.number,
        options.held_out,
        options.batch_size,
        options.seed,
        options.min_cls_cosine,
        options.min_patch_cosine,
        options.device,
    )
    task = bars.add_task("finding neurons", total=options.number)
    images = _images(options, weights)
    report = registers_file(weights, directions, images, order, lambda n: bars.advance(task, n))
    for part in report_parts(options.out, options.hook, report):
        print(part) if isinstance(part, str) else out.print(part)
    return 0


def main() -> int:
    """Run one verb."""
    options = parse(sys.argv[1:])
    with bars:
        return int(options.run(options))


if __name__ == "__main__":
    sys.exit(exit_status("sinder.py", main))
