"""All scores of one frozen backbone, each with an interval over test images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.analysis.alignment import Cover, cover, energy_inside, mass, overlap, pointing
from pretrain.analysis.consistency import consistency
from pretrain.analysis.foreground import Foreground
from pretrain.analysis.knn import knn_predict
from pretrain.analysis.last_blocks import LastBlocks
from pretrain.analysis.linear_probe import LinearScores
from pretrain.analysis.maps import cls_attention
from pretrain.analysis.retrieval import retrieve
from pretrain.analysis.segmentation import IGNORED, confusions, fit_segmentation, summary
from pretrain.analysis.uncertainty import bootstrap, bootstrap_statistic
from pretrain.analysis.view import View
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer

NEIGHBOURS = (10, 20, 100, 200)  # DINOv2, eval/knn.py
TEMPERATURE = 0.07
SEED = 0  # of bootstrap intervals


@dataclass(frozen=True)
class Score:
    """A number and how much it would move with other images of the same kind."""

    group: str  # what is evaluated
    name: str
    value: float
    low: float  # of the bootstrap interval
    high: float
    percent: bool = True  # or a correlation
    values: Tensor | None = None  # (m,) whose mean it is, one for each image


def _score(group: str, name: str, values: Tensor, percent: bool = True) -> Score:
    """The mean of values (m,), one for each image; shares become percent."""
    scaled = values.double() * (100 if percent else 1)
    found = bootstrap(scaled.numpy(), SEED)
    return Score(group, name, found.mean, found.low, found.high, percent, scaled)


def knn_scores(train: LastBlocks, test: LastBlocks) -> list[Score]:
    """k-NN of the class token, for each k that the training images allow."""
    bank, rows = train.features(1, False), test.features(1, False)
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    found = []
    for k in neighbours(len(bank)):
        predicted = knn_predict(bank, train.labels, rows, k, TEMPERATURE, classes)
        found.append(_score("k-NN", f"k = {k}", (predicted == test.labels).cpu()))
    return found


def neighbours(number: int) -> list[int]:
    """The values of k that `number` training images allow; all of them where there are few."""
    return [k for k in NEIGHBOURS if k <= number] or [number]


def linear_scores(found: LinearScores) -> list[Score]:
    """The chosen probe, and the oracle, which no interval makes honest."""
    chosen = _score("linear", "chosen on held-out training images", found.correct)
    best = found.oracle.test
    return [chosen, Score("linear", "oracle: best of the grid on test", best, best, best)]


def retrieval_scores(train: LastBlocks, test: LastBlocks) -> list[Score]:
    """Training images are the gallery, test images the queries; class tokens."""
    found = retrieve(train.features(1, False), train.labels, test.features(1, False), test.labels)
    return [
        _score("retrieval", "recall@1", found.hit),
        _score("retrieval", "mAP over classes", found.over_classes()),
    ]


def consistency_scores(backbone: VisionTransformer, images: Tensor, batch_size: int) -> list[Score]:
    """Attention of the class token in the last block under moves of the images (n, C, S, S).

    Raises:
        InputError: fewer than two images.
    """
    if len(images) < 2:
        raise InputError("--number: consistency of attention needs two or more images")
    device = next(backbone.parameters()).device

    def maps_of(pixels: Tensor) -> Tensor:
        parts = pixels.split(batch_size)
        return torch.cat([cls_attention(backbone, part.to(device)).cpu() for part in parts])

    found = consistency(maps_of, images)
    return [_score("attention consistency", move, values, percent=False) for move, values in found.items()]


def segmentation_scores(seen: View, masks: Tensor) -> list[Score]:
    """Linear segmentation, fitted on the first half of the images and scored on the pixels of the second.

    Raises:
        InputError: the first half shows a single class, or nothing in the second counts.
    """
    half = len(masks) // 2
    if (masks[half:] == IGNORED).all():
        raise InputError(f"--masks: in the half that is scored all is ignored ({IGNORED}); take more images")
    fitted = fit_segmentation(seen.patches[:half], masks[:half])
    counts = confusions(fitted, seen.patches[half:], masks[half:])
    miou = summary(counts.sum(dim=0)).miou
    ends = bootstrap_statistic(lambda rows: summary(counts[rows].sum(dim=0)).miou, len(counts), SEED)
    return [Score("segmentation", "linear, mIoU", miou, *ends)]


def alignment_scores(seen: View, masks: Tensor) -> list[Score]:
    """Attention and foreground by PCA against masks (n, S, S) of which 0 is background.

    Raises:
        InputError: no mask shows anything but background.
    """
    covered = cover(masks, *seen.patches.shape[1:3])
    shown = covered.inside.sum(dim=(1, 2)) > 0
    if not shown.any():
        raise InputError("--masks: all are background (0) or ignored (255); alignment needs an object")
    covered = Cover(*(part[shown] for part in covered))
    attention, patches = seen.attention[shown], seen.patches[shown]
    heads = torch.stack([overlap(mass(maps), covered) for maps in attention.unbind(1)], dim=1)  # (n, H)
    foreground = Foreground.fit(patches)
    best = heads[:, int(heads.mean(dim=0).argmax())]
    return [
        *_aligned("attention", attention.mean(dim=1), mass(attention.mean(dim=1)), covered),
        _score("alignment", "attention, IoU, oracle: best head", best),
        *_aligned(
            "PCA foreground", foreground.values(patches).clamp(min=0), foreground.mask(patches), covered
        ),
        _score("alignment", "area of the objects: what ignorance scores", covered.area()),
    ]


def _aligned(name: str, maps: Tensor, places: Tensor, covered: Cover) -> list[Score]:
    return [
        _score("alignment", f"{name}, IoU", overlap(places, covered)),
        _score("alignment", f"{name}, pointing game", pointing(maps, covered)),
        _score("alignment", f"{name}, energy inside", energy_inside(maps, covered)),
    ]


def differences(first: Sequence[Score], second: Sequence[Score]) -> list[Score]:
    """What another model scores more on the same images, image by image; the oracle and mIoU are left out."""
    theirs, found = {(score.group, score.name): score for score in second}, []
    for a in first:
        b = theirs.get((a.group, a.name))
        if b is not None and a.values is not None and b.values is not None:
            more = bootstrap((b.values - a.values).numpy(), SEED)
            found.append(Score(a.group, a.name, b.value - a.value, more.low, more.high, a.percent))
    return found
