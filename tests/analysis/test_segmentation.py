"""A linear probe on patches, scored on pixels, against counting by hand."""

import pytest
import torch

from pretrain.analysis.segmentation import IGNORED, linear_segmentation
from pretrain.errors import InputError


def scene(number: int, classes: int, seed: int, noise: float = 0.1):
    """Tokens (n, 6, 6, 8) that tell their patch's class, and masks (n, 24, 24)."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(classes, (number, 3, 3), generator=generator)
    patches = patches.repeat_interleave(2, 1).repeat_interleave(2, 2)  # regions of 2 x 2 patches
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(0))
    tokens = centres[patches] + noise * torch.randn(number, 6, 6, 8, generator=generator)
    return tokens, patches.repeat_interleave(4, 1).repeat_interleave(4, 2)


def naive(predicted: torch.Tensor, masks: torch.Tensor) -> tuple[float, float]:
    """mIoU and accuracy, class by class."""
    counts = masks != IGNORED
    ious = []
    for c in masks[counts].unique():
        both = ((predicted == c) & (masks == c) & counts).sum()
        either = (((predicted == c) | (masks == c)) & counts).sum()
        ious.append(float(both / either))
    return 100 * sum(ious) / len(ious), float(100 * (predicted == masks)[counts].float().mean())


@pytest.mark.parametrize("classes", [2, 4])
def test_it_finds_what_tokens_tell_and_counts_every_pixel(classes):
    train, test = scene(12, classes, seed=1), scene(8, classes, seed=2)
    scores = linear_segmentation(*train, *test)
    assert scores.miou > 75 and scores.classes == list(range(classes))  # borders are smoothed
    noise = torch.randn(12, 6, 6, 8, generator=torch.Generator().manual_seed(3))
    assert linear_segmentation(noise, train[1], *test).miou < 60


def test_scores_equal_counting_by_hand(monkeypatch):
    from pretrain.analysis import segmentation

    train, (tokens, masks) = scene(12, 3, seed=1), scene(5, 3, seed=2, noise=0.8)
    masks = masks.clone()
    masks[:, :5] = IGNORED
    seen, real = [], segmentation._scores

    def kept(probe, image, size):
        seen.append(real(probe, image, size))
        return seen[-1]

    monkeypatch.setattr(segmentation, "_scores", kept)
    scores = linear_segmentation(*train, tokens, masks)
    predicted = torch.stack([score.argmax(dim=0) for score in seen])
    assert (scores.miou, scores.accuracy) == pytest.approx(naive(predicted, masks))


def test_a_class_that_only_the_test_images_have_counts_as_missed():
    train, (tokens, masks) = scene(12, 2, seed=1), scene(5, 2, seed=2)
    masks = masks.clone()
    masks[0] = 7
    scores = linear_segmentation(*train, tokens, masks)
    assert scores.classes == [0, 1, 7] and scores.iou[2] == 0


def test_one_class_is_refused():
    tokens, masks = scene(4, 2, seed=1)
    with pytest.raises(InputError, match="show one class only"):
        linear_segmentation(tokens, torch.zeros_like(masks), tokens, masks)
