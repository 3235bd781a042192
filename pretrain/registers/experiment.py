"""A whole experiment on one backbone: calibrate, look, score, compare."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pretrain.analysis.backbone import build_backbone, model_fingerprint
from pretrain.analysis.images import ImageSet
from pretrain.config.derived import prefix_tokens, vit_shape
from pretrain.errors import InputError
from pretrain.export.weights import Weights
from pretrain.models.vit import VisionTransformer
from pretrain.registers import samples
from pretrain.registers.calibration import Calibration, calibrate, load, preprocessing, save
from pretrain.registers.conditions import Condition, fitting
from pretrain.registers.interventions import Intervention, parse_blocks
from pretrain.registers.looks import FULL, Looked, Seen, look
from pretrain.registers.pictures import Pictured, pictured
from pretrain.registers.results import Effect, Result, Score, Scores, compared
from pretrain.registers.tasks import classification, correspondence, segmentation

Stage = Callable[[str, int], Callable[[int], None]]  # name and number of images to what is told of images


@dataclass(frozen=True)
class Order:
    """What is to be done."""

    conditions: Sequence[Condition]
    blocks: str = "all"
    number: int = 200  # images that are scored
    train: int = 400  # that probes are fitted on, where there are labels or masks
    calibration_images: int = 500
    calibration_file: Path | None = None  # read where it exists, else written
    bank_images: int = 512  # whole examples kept of the calibration images
    attention_images: int = 64  # attention is compared on
    pairs: int = 200  # of images and warps
    masks: Path | None = None
    pictures: int = 0  # images that are shown
    batch_size: int = 8
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Experiment:
    """What was found, and with what."""

    result: Result
    left_out: Sequence[Condition]  # of a model without registers
    calibration_images: int
    classes: int  # that the scored images show; 0: they have no labels
    pictured: Pictured | None  # where pictures were asked for


@dataclass(frozen=True)
class _Setting:
    """All that the parts of an experiment share."""

    backbone: VisionTransformer
    images: ImageSet
    split: samples.Split
    calibration: Calibration
    interventions: Mapping[str, Intervention]
    order: Order
    stage: Stage

    def batches(self, part: Sequence[int]) -> Iterator[samples.Batch]:
        """Of images of one part."""
        return samples.batches(self.images, part, self.order.batch_size)


def run(weights: Weights, images: ImageSet, order: Order, stage: Stage) -> Experiment:
    """Do all of it.

    Raises:
        InputError: the images are too few, or the order does not fit the model.
    """
    registers, grid = prefix_tokens(weights.model) - 1, images.size // weights.model.patch_size
    kept = fitting(order.conditions, registers, grid**2)
    blocks = parse_blocks(order.blocks, vit_shape(weights.model).depth)
    labelled = _labelled(images)
    split = _split(images, order, labelled or order.masks is not None)
    backbone = build_backbone(weights, torch.device(order.device))
    calibration = _calibrated(weights, backbone, images, split, order, stage)
    interventions = {str(one): Intervention(one, blocks, calibration, order.seed) for one in kept}
    setting = _Setting(backbone, images, split, calibration, interventions, order, stage)
    test, scores = _scored(setting, labelled)
    left_out = [condition for condition in order.conditions if condition not in kept]
    classes = len(set(test.labels)) if labelled else 0
    result = _result(test, compared(scores, order.seed))
    shown = _pictured(setting) if order.pictures else None
    return Experiment(result, left_out, calibration.images, classes, shown)


def _labelled(images: ImageSet) -> bool:
    """Whether there are classes; of shards the first image that can be read speaks for all."""
    for index in range(len(images) if images.reader is not None else 0):
        with suppress(ValueError, OSError):
            return images.stored(index).label is not None
    return bool(images.classes)


def _split(images: ImageSet, order: Order, probes: bool) -> samples.Split:
    made = order.calibration_file is not None and order.calibration_file.exists()
    calibration = 0 if made else order.calibration_images
    return samples.split(images, order.seed, order.number, order.train if probes else 0, calibration)


def _calibrated(
    weights: Weights,
    backbone: VisionTransformer,
    images: ImageSet,
    split: samples.Split,
    order: Order,
    stage: Stage,
) -> Calibration:
    """That of the file, or of images that are evaluated nowhere, byte for byte."""
    name, words, file = model_fingerprint(weights), preprocessing(images), order.calibration_file
    evaluated = samples.keys(images, [*split.test, *split.train])
    if file is not None and file.exists():
        return load(file, name, words, evaluated)
    shown = samples.batches(images, split.calibration, order.batch_size, evaluated)
    advance = stage("calibrating", len(split.calibration))
    made = calibrate(backbone, shown, name, words, order.bank_images, order.seed, advance)
    if file is not None:
        save(file, made)
    return made


def _scored(setting: _Setting, labelled: bool) -> tuple[Looked, Scores]:
    """A look at the scored images, and the scores of all tasks."""
    order, split = setting.order, setting.split
    segmented = _segmented(setting) if order.masks is not None else Scores()  # first: masks may be refused
    test, scores = _looked(setting, "looking at images", split.test), Scores()
    if labelled:
        train = _looked(setting, "looking at images for probes", split.train, measured=False)
        scores = classification(train, test)
    pairs = split.test[: order.pairs]
    advance = setting.stage("matching pairs", len(pairs))
    scores |= correspondence(
        setting.backbone, setting.batches(pairs), setting.interventions, order.seed, advance
    )
    return test, scores | segmented


def _segmented(setting: _Setting) -> Scores:
    order, split = setting.order, setting.split
    assert order.masks is not None
    advance = setting.stage("segmenting", (1 + len(setting.interventions)) * (order.number + order.train))
    return segmentation(
        setting.backbone,
        setting.images,
        order.masks,
        (split.train, split.test),
        order.batch_size,
        setting.interventions,
        advance,
    )


def _looked(setting: _Setting, words: str, part: Sequence[int], measured: bool = True) -> Looked:
    advance = setting.stage(words, len(part))
    found = look(
        setting.backbone,
        setting.batches(part),
        setting.interventions,
        setting.calibration,
        setting.order.attention_images,
        advance,
        measured,
    )
    if not found.images:
        raise InputError(f"--images: all that are wanted are damaged, as {setting.images.damaged[0]}")
    return found


def _pictured(setting: _Setting) -> Pictured:
    """The first images, in one batch."""
    wanted = min(setting.order.pictures, len(setting.split.test))
    shown = next(samples.batches(setting.images, setting.split.test, wanted))
    return pictured(setting.backbone, shown, setting.interventions, setting.images.scaling)


def _result(test: Looked, scores: dict[str, dict[str, Score]]) -> Result:
    effects = {name: _effect(seen) for name, seen in test.seen.items() if name != FULL}
    return Result(test.images, float(torch.cat(test.ranks).mean()), effects, scores)


def _effect(seen: Seen) -> Effect:
    cosines = torch.cat(seen.cosines).double().numpy()
    low, middle = np.percentile(cosines, [5, 50])
    attention = seen.attention.means() if seen.attention.images else {}
    return Effect(float(cosines.mean()), float(low), float(middle), attention, seen.oddness.means())
