"""A test-time register for a file of weights (arXiv 2506.08010): which neurons, how many, what it changes.

Nothing is trained and no weight changes: the export's model section names the neurons, and whoever builds the
model from it gets the register. Neurons are found on some images, their number and all figures on others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pretrain.analysis.backbone import build_backbone
from pretrain.analysis.images import ImageSet
from pretrain.config.derived import ffn_hidden_dim, vit_shape
from pretrain.errors import InputError
from pretrain.export.own import write_export
from pretrain.export.provenance import with_entry
from pretrain.export.targets import check_free
from pretrain.export.weights import Weights
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.diagnosis import Diagnosis, diagnose, worst_layer
from pretrain.sinder.directions import LayerDirection
from pretrain.sinder.held_out import HeldOut, Measure
from pretrain.sinder.hook_file import check_hook, write_hook
from pretrain.sinder.register_neurons import RegisterNeuron, find_register_neurons
from pretrain.surgery.conversion import Change

LADDER = (1, 2, 5, 10, 20, 50, 100, 200)  # numbers of neurons to try; the paper takes 50
ENOUGH = 0.1  # of the original's share of defective patches: the first number below it is taken

Outcome = Literal["nothing to do", "removed", "reduced", "no gain", "too much drift"]


@dataclass(frozen=True)
class RegistersOrder:
    """What is asked for."""

    out: Path
    hook: Path | None = None  # where a hook for Hugging Face's models goes
    arguments: Sequence[str] = ()
    force: bool = False
    neurons: int | None = None  # None = by the ladder
    last_block: int | None = None  # of the neurons; None = the first defective one
    number: int = 64  # images to find neurons on: the first of the seeded order
    held_out: int = 16  # images for everything else: the last of the order
    batch_size: int = 8
    seed: int = 0  # of the order of the images
    min_cls_cosine: float = 0.98  # of the class token with the original's: a number below it is not taken
    min_patch_cosine: float = 0.98  # likewise, of clean patches
    device: str = "cpu"


class Trial(NamedTuple):
    """What a number of neurons does, on held-out images."""

    neurons: int
    measure: Measure


@dataclass(frozen=True)
class RegistersReport:
    """What was found and done; the figures are of the held-out images."""

    outcome: Outcome
    before: Diagnosis
    held_out: int  # images
    damaged_images: list[str]
    images: int = 0  # that the neurons were found on
    outlier_block: int = 0  # the worst one: outliers are those after it
    last_block: int = 0  # of the neurons
    shares: Sequence[float] = ()  # of defective patches of the original, after each block
    trials: Sequence[Trial] = ()
    chosen: Trial | None = None
    neurons: Sequence[RegisterNeuron] = ()  # chosen ones, the most active first
    verdict_after: str | None = None
    changes: Sequence[Change] = ()  # of the export against the source, beside the register


def registers_file(
    weights: Weights,
    directions: Sequence[LayerDirection],
    images: ImageSet,
    order: RegistersOrder,
    advance: Callable[[int], None] = lambda _: None,
) -> RegistersReport:
    """Find register neurons and write an export that has them; nothing is written where nothing is gained.

    Args:
        weights: of any format.
        directions: predicted from them.
        images: at least `number` and `held_out`.
        order: what is asked for.
        advance: told of images that neurons are found on.

    Raises:
        InputError: the order is wrong, a target exists, or there are too few images, or none with outliers.
    """
    _check(weights, images, order)
    device = torch.device(order.device)
    backbone = build_backbone(weights, device)
    _, held = images.chosen(images.held_out(order.seed, order.held_out))
    before = diagnose(backbone, directions, held.split(order.batch_size))
    report = RegistersReport("nothing to do", before, before.images, images.damaged, changes=weights.changes)
    if before.verdict == "clean" or before.first_layer is None:
        return report
    last = before.first_layer if order.last_block is None else order.last_block
    report = replace(report, outlier_block=worst_layer(before.layers), last_block=last)
    plain = [layer.direction.float().to(device) for layer in directions]
    damaged = len(images.damaged)
    ranked = _ranked(backbone, images, plain[report.outlier_block], order, report, advance)
    limits = HeldOut(backbone, held, plain, order.batch_size)
    found_on = order.number - (len(images.damaged) - damaged)
    report = replace(report, images=found_on, shares=limits.measure(backbone).by_both)
    report = _choose(report, list(_trials(backbone, ranked, limits, report, order)), order)
    if report.chosen is None:
        return report
    report = replace(report, neurons=ranked[: report.chosen.neurons])
    changed = with_register(backbone, report.neurons)
    after = diagnose(changed, directions, held.split(order.batch_size))
    report = replace(report, verdict_after=after.verdict)
    _write(weights, order, report)
    return report


def with_register(backbone: VisionTransformer, neurons: Sequence[RegisterNeuron]) -> VisionTransformer:
    """The backbone with a test-time register; it has the same tensors."""
    model = replace(backbone.cfg, register_neurons=_pairs(neurons))
    with torch.device("meta"):
        changed = VisionTransformer(model, backbone.backend)
    changed.load_state_dict(backbone.state_dict(), assign=True)
    return changed.requires_grad_(False).eval()


def _pairs(neurons: Sequence[RegisterNeuron]) -> list[list[int]]:
    return sorted([neuron.block, neuron.unit] for neuron in neurons)


def _check(weights: Weights, images: ImageSet, order: RegistersOrder) -> None:
    check_free(order.out, "ours", order.force)
    if order.hook is not None:
        check_hook(order.hook, order.force)
    if weights.model.register_neurons:
        raise InputError(f"{weights.path}: has a test-time register already; give the file it was made from")
    depth, hidden = vit_shape(weights.model).depth, ffn_hidden_dim(weights.model)
    if order.last_block is not None and not 0 <= order.last_block < depth:
        raise InputError(f"--last-block: {order.last_block} must be from 0 to {depth - 1}")
    if order.neurons is not None and not 1 <= order.neurons <= hidden:
        raise InputError(f"--neurons: {order.neurons} must be from 1 to {hidden}, the units of a block")
    needed = order.number + order.held_out
    if len(images) < needed:
        raise InputError(
            f"--images: {images.source} holds {len(images)} images, {needed} are needed "
            f"({order.held_out} held out and {order.number} to find neurons on, see --number)"
        )


def _batches(images: ImageSet, order: RegistersOrder) -> Iterator[Tensor]:
    """The undamaged images to find neurons on."""
    shuffled = images.shuffled(order.seed)
    for start in range(0, order.number, order.batch_size):
        places = range(start, min(start + order.batch_size, order.number))
        batch = images.batch([shuffled(place) for place in places])
        if batch is not None:
            yield batch


def _ranked(
    backbone: VisionTransformer,
    images: ImageSet,
    direction: Tensor,
    order: RegistersOrder,
    report: RegistersReport,
    advance: Callable[[int], None],
) -> list[RegisterNeuron]:
    """The neurons to choose from, the most active first."""
    worst, last = report.outlier_block, report.last_block
    number = LADDER[-1] if order.neurons is None else order.neurons
    batches = _batches(images, order)
    return find_register_neurons(backbone, batches, direction, worst, last, number, advance)


def _trials(
    backbone: VisionTransformer,
    ranked: Sequence[RegisterNeuron],
    limits: HeldOut,
    report: RegistersReport,
    order: RegistersOrder,
) -> Iterator[Trial]:
    """Up the ladder, until a number is enough."""
    ladder = LADDER if order.neurons is None else (order.neurons,)
    for number in (number for number in ladder if number <= len(ranked)):
        trial = Trial(number, limits.measure(with_register(backbone, ranked[:number])))
        yield trial
        if _kept(trial, order) and _enough(trial, report):
            return


def _kept(trial: Trial, order: RegistersOrder) -> bool:
    """Whether features drift no further than allowed; not where a figure is not a number."""
    cls, patches = trial.measure.cls_cosine, trial.measure.patch_cosine
    return cls >= order.min_cls_cosine and patches >= order.min_patch_cosine


def _enough(trial: Trial, report: RegistersReport) -> bool:
    worst = report.outlier_block
    return trial.measure.by_both[worst] < ENOUGH * report.shares[worst]


def _choose(report: RegistersReport, trials: Sequence[Trial], order: RegistersOrder) -> RegistersReport:
    """The first number that is enough, else the one that leaves least, else none."""
    worst = report.outlier_block
    kept = [trial for trial in trials if _kept(trial, order)]
    best = min(kept, key=lambda trial: trial.measure.by_both[worst], default=None)
    report = replace(report, trials=trials)
    if best is None:
        return replace(report, outcome="too much drift")
    if best.measure.by_both[worst] >= report.shares[worst]:
        return replace(report, outcome="no gain")
    return replace(report, chosen=best, outcome="removed" if _enough(best, report) else "reduced")


def _write(weights: Weights, order: RegistersOrder, report: RegistersReport) -> None:
    assert report.chosen is not None
    about = with_entry(weights.about, "sinder", order.arguments, [weights.path])
    about["test_time_registers"] = {
        "outcome": report.outcome,
        "verdict_before": report.before.verdict,
        "verdict_after": report.verdict_after,
        "images": report.images,
        "held_out": report.held_out,
        "outlier_block": report.outlier_block,
        "before": {"by_both": list(report.shares)},
        "after": asdict(report.chosen.measure),
        "neurons": [neuron._asdict() for neuron in report.neurons],
    }
    model = replace(weights.model, register_neurons=_pairs(report.neurons))
    write_export(order.out, weights.state, model, about)
    if order.hook is not None:
        write_hook(order.hook, model.register_neurons)
