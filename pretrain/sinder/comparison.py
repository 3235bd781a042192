"""Several states of one model on the same images: defects by the first one's thresholds, drift, scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.analysis.backbone import build_backbone
from pretrain.analysis.segmentation import SegmentationScores
from pretrain.config.derived import vit_shape
from pretrain.errors import InputError
from pretrain.export.weights import Weights
from pretrain.sinder.diagnosis import Diagnosis, diagnose
from pretrain.sinder.directions import LayerDirection, defect_directions
from pretrain.sinder.held_out import Measure, Original
from pretrain.sinder.labels import Labels, knn, segmentation
from pretrain.sinder.look import Look, look


@dataclass(frozen=True)
class Subject:
    """One of the models."""

    name: str
    directions: list[LayerDirection]  # that its own weights predict
    diagnosis: Diagnosis  # along them
    seen: Look | None = None  # along those of the first model
    measure: Measure | None = None  # by the thresholds of the first model
    knn: dict[str, float] | None = None  # percent
    segmentation: SegmentationScores | None = None


def compare(
    files: Sequence[Weights],
    names: Sequence[str],
    images: Tensor,
    device: torch.device,
    batch_size: int,
    labels: Labels | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Subject]:
    """Look at the same images with each model, one after the other.

    Args:
        files: the first is the original.
        names: of the models, for tables.
        images: (n, C, S, S').
        device: for all of them.
        batch_size: images at once.
        labels: of these and other images.
        advance: told of images, twice each for each model.

    Raises:
        InputError: the models are not of one shape.
    """
    check_alike(files)
    subjects: list[Subject] = []
    plain: list[Tensor] = []
    original: Original | None = None
    for weights, name in zip(files, names, strict=True):
        directions = defect_directions(weights.state, weights.model)
        plain = plain or [layer.direction.float().to(device) for layer in directions]
        backbone = build_backbone(weights, device)
        diagnosis = diagnose(backbone, directions, images.split(batch_size), advance)
        seen = look(backbone, images, plain, batch_size, advance)
        original = original or Original(seen)
        scores = knn(backbone, labels, batch_size) if labels else None
        pixels = segmentation(seen, labels) if labels else None
        subjects.append(Subject(name, directions, diagnosis, seen, original.measure(seen), scores, pixels))
    return subjects


def check_alike(files: Sequence[Weights]) -> None:
    """Refuse models whose tokens cannot be laid side by side.

    Raises:
        InputError: another depth, width or patch size than the first one's.
    """
    first = files[0]
    for other in files[1:]:
        for what, ours, theirs in (
            ("blocks", vit_shape(first.model).depth, vit_shape(other.model).depth),
            ("channels a token", vit_shape(first.model).embed_dim, vit_shape(other.model).embed_dim),
            ("pixels a patch", first.model.patch_size, other.model.patch_size),
        ):
            if ours != theirs:
                raise InputError(
                    f"{other.path}: has {theirs} {what}, {first.path} {ours}; only copies of one model, "
                    "repaired or otherwise changed, can be compared"
                )
