"""What features are worth under each condition; scores stay by image, so that conditions can be paired.

A `fixed` probe is fitted on features of the full model: can what reads them go on. A `refit` one is fitted on
features of the condition itself: is the information there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.analysis.images import ImageSet
from pretrain.analysis.masks import read_masks
from pretrain.analysis.segmentation import confusions, fit_segmentation, summary
from pretrain.config.derived import prefix_tokens
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer
from pretrain.registers.classification import fit_probe, probe_hits, recall_at_one
from pretrain.registers.correspondence import Matches, match
from pretrain.registers.interventions import Intervention
from pretrain.registers.looks import FULL, Looked, features
from pretrain.registers.measures import untouched
from pretrain.registers.results import Paired, Scores
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
                full = scores[task][FULL].own if task in scores else values
                scores.setdefault(task, {})[name] = Paired(values, full)
    return scores


def correspondence(
    backbone: VisionTransformer,
    pairs: Iterable[Batch],
    interventions: Mapping[str, Intervention],
    seed: int,
    advance: Advance = lambda _: None,
) -> Scores:
    """Patches of images matched with those of one random warp of each.

    Replaced patches neither look for a match nor are one, in the full model that they are compared with too.
    """
    found: dict[str, list[tuple[Matches, Matches]]] = {FULL: [], **{name: [] for name in interventions}}
    for batch in pairs:
        warps = [random_warp(seed, key) for key in batch.keys]
        full = _both(backbone, batch, warps, None)
        for name, intervention in {FULL: None, **interventions}.items():
            own = full if intervention is None else _both(backbone, batch, warps, intervention)
            compared = (_matched(patches, own.kept, warps) for patches in (own.patches, full.patches))
            found[name] += zip(*compared, strict=True)
        advance(len(batch.keys))
    return {
        task: {
            name: Paired(*(torch.tensor([pair[part][place] for pair in both]).double() for part in (0, 1)))
            for name, both in found.items()
        }
        for place, task in enumerate(("correspondence", "cycle consistency"))
    }


class _Pairs(NamedTuple):
    """Of images and their warps."""

    patches: tuple[Tensor, Tensor]  # (B, N, D) of each
    kept: tuple[Tensor, Tensor]  # (B, N) bool of each: not replaced


def _both(
    backbone: VisionTransformer, batch: Batch, warps: list[Tensor], intervention: Intervention | None
) -> _Pairs:
    pixels = torch.stack([warped(own, warp) for own, warp in zip(batch.pixels, warps, strict=True)])
    names = [f"{key} warped" for key in batch.keys]  # other draws than the image's own
    (first, at), (second, there) = (
        features(backbone, images, keys, intervention)
        for images, keys in ((batch.pixels, batch.keys), (pixels, names))
    )
    prefix, number = prefix_tokens(backbone.cfg), first.patches.shape[1]
    kept = (untouched(at, prefix, number), untouched(there, prefix, number))
    return _Pairs((first.patches, second.patches), kept)


def _matched(
    patches: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor], warps: list[Tensor]
) -> list[Matches]:
    """Of each pair; NaN where no patch could be matched."""
    return [
        match(first, second, warp, (own, other)) or Matches(torch.nan, torch.nan)
        for first, second, warp, own, other in zip(*patches, warps, *kept, strict=True)
    ]


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
        InputError: a mask cannot be used, the masks show one class only, or all images are damaged.
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
            own = torch.tensor(found, dtype=torch.float64)
            scores[task][name] = Paired(own, scores[task][FULL].own if scores[task] else own)
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
    if not tokens:
        raise InputError(f"--images: all that are wanted are damaged, as {images.damaged[0]}")
    return torch.cat(tokens), torch.cat(read)
