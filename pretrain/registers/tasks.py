"""What features are worth under each condition; scores stay by image, so that conditions can be paired.

A `fixed` probe is fitted on features of the full model: can what reads them go on. A `refit` one is fitted on
features of the condition itself: is the information there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain.analysis.images import ImageSet
from pretrain.analysis.masks import read_masks
from pretrain.analysis.segmentation import confusions, fit_segmentation, summary
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer
from pretrain.registers.classification import fit_probe, probe_hits, recall_at_one
from pretrain.registers.correspondence import Matches, match
from pretrain.registers.interventions import Intervention
from pretrain.registers.looks import FULL, Looked, features
from pretrain.registers.measures import untouched
from pretrain.registers.results import Scores
from pretrain.registers.samples import Batch, batches
from pretrain.registers.warps import random_warp, warped

Advance = Callable[[int], None]  # told of images
CLASSIFIED = {"cls": "class token", "patch_mean": "mean patch"}


def classification(train: Looked, test: Looked) -> Scores:
    """Linear probes and recall at one, of class token and mean patch; both passes have labels.

    Raises:
        InputError: the training images show one class only, or an image has no label.
    """
    if None in train.labels or None in test.labels:
        raise InputError("--images: some samples have a label and others none; pack them alike")
    labels, asked = (torch.tensor(looked.labels) for looked in (train, test))
    if len(labels.unique()) < 2:
        raise InputError("--train: the images for probes show one class only; take more with --train")
    scores: Scores = {}
    fixed = {kind: fit_probe(train.seen[FULL].pooled()[kind], labels) for kind in CLASSIFIED}
    for name in test.seen:
        fitted, shown = train.seen[name].pooled(), test.seen[name].pooled()
        for kind, words in CLASSIFIED.items():
            refit = fixed[kind] if name == FULL else fit_probe(fitted[kind], labels)
            found = {
                f"linear, {words}, fixed": probe_hits(fixed[kind], shown[kind], asked),
                f"linear, {words}, refit": probe_hits(refit, shown[kind], asked),
                f"recall@1, {words}": recall_at_one(shown[kind], asked),
            }
            for task, values in found.items():
                scores.setdefault(task, {})[name] = values
    return scores


def correspondence(
    backbone: VisionTransformer,
    pairs: Iterable[Batch],
    interventions: Mapping[str, Intervention],
    seed: int,
    advance: Advance = lambda _: None,
) -> Scores:
    """Patches of images matched with those of one random warp of each."""
    scores: dict[str, dict[str, list[float]]] = {}
    for batch in pairs:
        for name, intervention in {FULL: None, **interventions}.items():
            for accuracy, cycle in _matched(backbone, batch, intervention, seed):
                scores.setdefault("correspondence", {}).setdefault(name, []).append(accuracy)
                scores.setdefault("cycle consistency", {}).setdefault(name, []).append(cycle)
        advance(len(batch.keys))
    return {
        task: {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
        for task, found in scores.items()
    }


def _matched(
    backbone: VisionTransformer, batch: Batch, intervention: Intervention | None, seed: int
) -> list[Matches]:
    """Accuracy and cycle consistency of each pair; NaN where no patch could be matched."""
    warps = [random_warp(seed, key) for key in batch.keys]
    pixels = torch.stack([warped(own, warp) for own, warp in zip(batch.pixels, warps, strict=True)])
    names = [f"{key} warped" for key in batch.keys]  # other draws than the image's own
    (first, at), (second, there) = (
        features(backbone, images, keys, intervention)
        for images, keys in ((batch.pixels, batch.keys), (pixels, names))
    )
    prefix, number = 1 + backbone.cfg.num_register_tokens, first.patches.shape[1]
    kept = (untouched(at, prefix, number), untouched(there, prefix, number))
    found = []
    for image, warp in enumerate(warps):
        matches = match(first.patches[image], second.patches[image], warp, (kept[0][image], kept[1][image]))
        found.append(matches or Matches(torch.nan, torch.nan))
    return found


def segmentation(
    backbone: VisionTransformer,
    images: ImageSet,
    masks: Path,
    parts: tuple[Sequence[int], Sequence[int]],
    batch_size: int,
    interventions: Mapping[str, Intervention],
    advance: Advance = lambda _: None,
) -> Scores:
    """Mean IoU of each image by a linear classifier of patches; one condition's patches are held at a time.

    Args:
        backbone: on any device.
        images: of a folder.
        masks: the folder of their masks.
        parts: indices of images to fit on, and to score.
        batch_size: images at once.
        interventions: by condition.
        advance: told of images.

    Raises:
        InputError: a mask cannot be used, or shows one class only.
    """
    scores: Scores = {"segmentation, fixed": {}, "segmentation, refit": {}}
    fixed = None
    for name, intervention in {FULL: None, **interventions}.items():
        (tokens, told), (asked, truth) = (
            _patches(backbone, images, masks, part, batch_size, intervention, advance) for part in parts
        )
        refit = fit_segmentation(tokens, told)
        fixed = fixed or refit
        for probe, task in zip((fixed, refit), scores, strict=True):
            found = [summary(own).miou for own in confusions(probe, asked, truth)]
            scores[task][name] = torch.tensor(found, dtype=torch.float64)
    return scores


def _patches(
    backbone: VisionTransformer,
    images: ImageSet,
    masks: Path,
    part: Sequence[int],
    batch_size: int,
    intervention: Intervention | None,
    advance: Advance,
) -> tuple[Tensor, Tensor]:
    """Patch tokens (n, h, w, D) and masks (n, S, S)."""
    tokens, read = [], []
    for batch in batches(images, part, batch_size):
        found = features(backbone, batch.pixels, batch.keys, intervention)[0].patches
        side = batch.pixels.shape[-1] // backbone.patch_size
        tokens.append(found.float().cpu().unflatten(1, (side, side)))
        read.append(read_masks(masks, images, batch.indices))
        advance(len(batch.keys))
    return torch.cat(tokens), torch.cat(read)
