"""Repairs a file of weights: diagnosis before and after, a watch on drift, resumable, in the form it had."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from pretrain.analysis.backbone import build_backbone, model_fingerprint
from pretrain.analysis.images import ImageSet
from pretrain.errors import InputError, first_line
from pretrain.export.own import map_safetensors
from pretrain.export.provenance import with_entry
from pretrain.export.targets import check_free, write_weights
from pretrain.export.weights import Weights
from pretrain.run.durable import publish
from pretrain.run.safetensors_file import write_safetensors
from pretrain.sinder.diagnosis import Diagnosis, diagnose
from pretrain.sinder.directions import LayerDirection
from pretrain.sinder.held_out import HeldOut, Measure
from pretrain.sinder.repair import Repair, RepairSettings, Step, batches

Outcome = Literal["nothing to repair", "nothing trained", "repaired", "stopped by drift", "images used up"]


@dataclass(frozen=True)
class RepairOrder:
    """What a repair is told beside the method's settings."""

    out: Path
    arguments: Sequence[str] = ()
    force: bool = False
    held_out: int = 16  # images that are never trained on: the last of the seeded order
    check_every: int = 200  # images between looks at the held-out ones; progress is saved then
    min_cls_cosine: float = 0.98  # of the class token with the original's: below it, the repair stops
    min_patch_cosine: float = 0.98  # likewise, of clean patches
    device: str = "cpu"

    @property
    def progress(self) -> Path:
        """The file from which an interrupted repair goes on."""
        return self.out.with_name(self.out.name + ".progress")


@dataclass(frozen=True)
class RepairReport:
    """What a repair did."""

    outcome: Outcome
    verdict_before: str
    reason_before: str
    verdict_after: str | None
    first_block: int | None
    images: int
    before: Measure | None
    after: Measure | None
    damaged_images: list[str]
    written: bool


Watch = Callable[[Step, Measure | None], Any]


def repair_file(
    weights: Weights,
    directions: Sequence[LayerDirection],
    images: ImageSet,
    settings: RepairSettings,
    order: RepairOrder,
    watch: Watch = lambda _step, _measure: None,
) -> RepairReport:
    """Repair weights and write them in the form they had; nothing is written where no weight changed.

    A repair that was interrupted goes on from the file `OUT.progress`.

    Raises:
        InputError: too few images, a target that exists, progress of another repair, no space.
    """
    check_free(order.out, weights.form.target, order.force)
    needed = order.held_out + settings.batch_size
    if len(images) < needed:
        raise InputError(
            f"--images: {images.source} holds {len(images)} images, at least {needed} are needed "
            f"({order.held_out} held out and a batch of {settings.batch_size})"
        )
    device = torch.device(order.device)
    backbone = build_backbone(weights, device)
    _, held_images = images.chosen(images.held_out(settings.seed, order.held_out))
    before = diagnose(backbone, directions, held_images.split(settings.batch_size))
    if before.verdict == "clean":
        return _report("nothing to repair", before, None, None, 0, None, None, images)
    settings = replace(settings, criterion=replace(settings.criterion, first_block=before.first_layer or 0))
    plain = [layer.direction.float().to(device) for layer in directions]
    held = HeldOut(backbone, held_images, plain, settings.batch_size)
    start = held.measure(backbone)
    repair = Repair(backbone, plain, settings)
    outcome = _train(repair, held, images, weights, order, watch)
    end = held.measure(backbone)
    after = diagnose(backbone, directions, held_images.split(settings.batch_size))
    report = _report(outcome, before, after, before.first_layer, repair.images, start, end, images)
    if any(layer.epsilon.any() for layer in repair.layers.values()):
        report = replace(report, written=True)
        _write(repair, weights, order, report)
    elif outcome != "stopped by drift":  # whatever it says of the images, no weight changed
        report = replace(report, outcome="nothing trained")
    order.progress.unlink(missing_ok=True)
    return report


def _train(
    repair: Repair, held: HeldOut, images: ImageSet, weights: Weights, order: RepairOrder, watch: Watch
) -> Outcome:
    """Step until the repair is finished or features drift too far; then the last good state counts."""
    progress = _Progress(order.progress, weights, repair.settings)
    progress.load(repair)
    good, checked = repair.state_dict(), repair.images
    for taken, batch in batches(images, repair.settings, repair.images, len(images) - order.held_out):
        if repair.finished:
            break
        step, measure = repair.step(batch, taken), None
        if repair.images - checked >= order.check_every or repair.finished:
            checked, measure = repair.images, held.measure(repair.backbone)
            if _drifted(measure, order):
                repair.load_state_dict(good)
                return "stopped by drift"
            good = repair.state_dict()
            progress.save(good)
        watch(step, measure)
    # images that are left out at the end reach `max_images` in no step, so in none of the checks above
    if repair.images > checked and _drifted(held.measure(repair.backbone), order):
        repair.load_state_dict(good)
        return "stopped by drift"
    return "repaired" if repair.clean_share >= repair.settings.stop_share else "images used up"


def _drifted(measure: Measure, order: RepairOrder) -> bool:
    """Also where a figure is not a number."""
    cls, patches = measure.drift
    return not (cls >= order.min_cls_cosine and patches >= order.min_patch_cosine)


class _Progress:
    """The state of an interrupted repair, beside its target."""

    def __init__(self, path: Path, weights: Weights, settings: RepairSettings) -> None:
        self.path = path
        self.key = json.dumps({"settings": asdict(settings), "weights": model_fingerprint(weights)})

    def load(self, repair: Repair) -> None:
        """Go on with it, if there is one.

        Raises:
            InputError: it is of another repair, or damaged.
        """
        if not self.path.exists():
            return
        try:
            metadata, state = map_safetensors(self.path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path}: is damaged ({error}); remove it to start anew") from error
        if metadata.get("repair") != self.key:
            raise InputError(f"{self.path}: is of a repair with other weights or settings; remove it")
        repair.load_state_dict(state)  # copies: the file is replaced later

    def save(self, state: dict[str, Tensor]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.cpu() for name, tensor in state.items()}
            write_safetensors(temporary, tensors, metadata={"repair": self.key})
            publish(temporary, self.path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise InputError(f"{self.path}: cannot be written ({first_line(error)})") from error


def _report(
    outcome: Outcome,
    before: Diagnosis,
    after: Diagnosis | None,
    first: int | None,
    number: int,
    start: Measure | None,
    end: Measure | None,
    images: ImageSet,
) -> RepairReport:
    verdict = after.verdict if after else None
    damaged = sorted(set(images.damaged))
    return RepairReport(
        outcome, before.verdict, before.reason, verdict, first, number, start, end, damaged, False
    )


def _write(repair: Repair, weights: Weights, order: RepairOrder, report: RepairReport) -> None:
    about = with_entry(weights.about, "sinder", order.arguments, [weights.path])
    about["sinder"] = {
        key: value for key, value in asdict(report).items() if key not in ("damaged_images", "written")
    }
    form = weights.form
    repaired = repair.repaired(weights.state)
    write_weights(order.out, form.target, repaired, weights.model, about, form.chunks, form.split_swiglu)
