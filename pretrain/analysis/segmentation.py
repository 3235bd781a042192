"""Linear segmentation of frozen patch tokens: can a linear map tell the class of each pixel."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import interpolate

from pretrain.errors import InputError
from pretrain.seeding import numpy_stream

IGNORED = 255  # label of pixels that do not count
ROWS = 20_000  # patches that the probe is fitted on, drawn from all
ITERATIONS = 300  # of lbfgs; it usually ends earlier


@dataclass(frozen=True)
class SegmentationScores:
    """Over all pixels of the test images."""

    miou: float  # percent, mean over the classes that occur
    accuracy: float  # percent of pixels
    classes: list[int]
    iou: list[float]  # percent, of each class


def linear_segmentation(
    train: Tensor, train_masks: Tensor, test: Tensor, test_masks: Tensor, seed: int = 0
) -> SegmentationScores:
    """Fit a linear classifier of patches, score it on pixels.

    A patch's label is the class that most of its pixels have. On test images the classifier's scores are
    enlarged bilinearly to the masks' size, as DINOv2's linear evaluation does.

    Args:
        train: (n, h, w, D) patch tokens.
        train_masks: (n, S, S') int64 classes of pixels, S and S' multiples of h and w; 255 = does not count.
        test: (m, h, w, D).
        test_masks: (m, S, S').
        seed: of the patches that are drawn where there are too many.

    Raises:
        InputError: fewer than two classes to tell apart.
    """
    probe = fit_segmentation(train, train_masks, seed)
    return summary(confusions(probe, test, test_masks).sum(dim=0))


def confusions(probe: Pipeline, tokens: Tensor, masks: Tensor) -> Tensor:
    """Pixels of each image by true class (rows) and predicted class (columns), (m, classes, classes) int64.

    Args:
        probe: of `fit_segmentation`.
        tokens: (m, h, w, D).
        masks: (m, S, S').
    """
    classes = probe[-1].classes_.tolist()
    size = max(*classes, *masks[masks != IGNORED].unique().tolist()) + 1
    found = torch.zeros(len(masks), size, size, dtype=torch.int64)
    for image, (own, mask) in enumerate(zip(tokens, masks, strict=True)):
        predicted = torch.tensor(classes)[_scores(probe, own, mask.shape).argmax(dim=0)]
        counts = mask != IGNORED
        pairs = mask[counts] * size + predicted[counts]
        found[image] = torch.bincount(pairs, minlength=size * size).view(size, size)
    return found


def _patch_labels(masks: Tensor, rows: int, cols: int) -> Tensor:
    """(n, S, S') to (n, rows, cols): the most frequent class of each patch, 255 included."""
    number, height, width = masks.shape
    cells = masks.view(number, rows, height // rows, cols, width // cols).transpose(2, 3).flatten(3)
    return cells.mode(dim=-1).values


def fit_segmentation(tokens: Tensor, masks: Tensor, seed: int = 0) -> Pipeline:
    """A linear classifier of patch tokens (n, h, w, D), told by masks (n, S, S').

    Raises:
        InputError: fewer than two classes to tell apart.
    """
    rows, classes = tokens.flatten(0, 2), _patch_labels(masks, *tokens.shape[1:3]).flatten()
    rows, classes = rows[classes != IGNORED], classes[classes != IGNORED]
    if len(classes.unique()) < 2:
        raise InputError("--masks: those a probe is fitted on show one class only; take more images")
    if len(classes) > ROWS:
        chosen = numpy_stream(seed, "segmentation").permutation(len(classes))[:ROWS]
        rows, classes = rows[chosen], classes[chosen]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS))
    return probe.fit(rows.numpy(), classes.numpy())


def _scores(probe: Pipeline, tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Scores of the classes, (h, w, D) to (classes, S, S')."""
    scores = probe.decision_function(tokens.flatten(0, 1).numpy())
    if scores.ndim == 1:
        scores = np.stack([-scores, scores], axis=1)  # of two classes there is one score
    grid = torch.from_numpy(scores).T.unflatten(1, tokens.shape[:2])
    return interpolate(grid[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0]


def summary(confusion: Tensor) -> SegmentationScores:
    """Scores of counted pixels; rows are true classes, columns predicted ones."""
    hits, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    present = confusion.sum(1) > 0
    iou = 100 * hits[present] / union[present]
    accuracy = 100 * hits.sum() / confusion.sum().clamp(min=1)
    miou = float(iou.mean()) if present.any() else math.nan
    return SegmentationScores(miou, float(accuracy), present.nonzero()[:, 0].tolist(), iou.tolist())
