"""Frozen features of labelled images, and the k-NN scores a run logs about them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.analysis.knn import knn_accuracy
from pretrain.config.schema import KnnConfig
from pretrain.errors import InputError

# images (b, 3, s, s) -> normed CLS token (b, D), normed patch tokens (b, N, D)
FeaturesFn = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of n images, fp32 on the CPU, in the order they were read."""

    cls: Tensor  # (n, D) normed CLS token
    patch_mean: Tensor  # (n, D) mean of the normed patch tokens
    labels: Tensor  # (n,) int64


def extract(features: FeaturesFn, batches: Iterable[tuple[Tensor, Tensor]]) -> LabelledFeatures:
    """Features of batches of (images (b, 3, s, s), labels (b,)); b may differ from batch to batch.

    Raises:
        InputError: there is no batch.
    """
    cls_parts, mean_parts, label_parts = [], [], []
    with torch.no_grad():
        for images, labels in batches:
            cls, patches = features(images)
            cls_parts.append(cls.to("cpu", torch.float32, copy=True))  # a view would keep all tokens
            mean_parts.append(patches.float().mean(dim=1).cpu())
            label_parts.append(labels.long().cpu())
    if not label_parts:
        raise InputError("log.knn: no labelled images were read; check log.knn.train and log.knn.test")
    return LabelledFeatures(torch.cat(cls_parts), torch.cat(mean_parts), torch.cat(label_parts))


def knn_scores(
    features: FeaturesFn,
    train_batches: Iterable[tuple[Tensor, Tensor]],
    test_batches: Iterable[tuple[Tensor, Tensor]],
    cfg: KnnConfig,
) -> dict[str, float]:
    """k-NN accuracy in percent of the CLS token, `knn/cls`, and of the mean patch token, `knn/patch_mean`.

    Raises:
        InputError: a split is empty, or log.knn.k is more than the training images.
    """
    train, test = extract(features, train_batches), extract(features, test_batches)
    return {
        f"knn/{kind}": knn_accuracy(
            getattr(train, kind), train.labels, getattr(test, kind), test.labels, cfg.k, cfg.temperature
        )
        for kind in ("cls", "patch_mean")
    }
