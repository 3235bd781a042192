"""Weighted k-nearest-neighbour classification of frozen features, as DINO and DINOv2 report it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import InputError

CHUNK = 2**25  # similarities held at a time: 128 MiB


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> float:
    """Percent of test rows whose label the k-NN vote gives; arguments as for `knn_predict`, test_labels (m,).

    Raises:
        InputError: as for `knn_predict`, or there are no test rows.
    """
    if len(test_features) == 0:
        raise InputError("log.knn.test: holds no images")
    predicted = knn_predict(train_features, train_labels, test_features, k, temperature, num_classes)
    return 100 * (predicted == test_labels.to(predicted.device)).float().mean().item()


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """The class of each test row, (m,): its k most similar training rows vote, each with exp(similarity / T).

    Args:
        train_features: (n, D), any scale: rows are divided by their length, so similarity is the cosine.
        train_labels: (n,) integers from 0.
        test_features: (m, D), on the same device.
        k: neighbours that vote.
        temperature: T; smaller lets the nearest ones weigh more.
        num_classes: default: the highest training label + 1.

    Raises:
        InputError: k is more than n.
    """
    if not 1 <= k <= len(train_features):
        raise InputError(f"log.knn.k={k}: must be 1 to {len(train_features)}, the number of training images")
    classes = num_classes or int(train_labels.max()) + 1
    labels = train_labels.to(train_features.device, torch.int64)
    bank = F.normalize(train_features.float(), dim=1).T  # (D, n)
    rows = max(1, CHUNK // bank.shape[1])
    chunks = torch.split(F.normalize(test_features.float(), dim=1), rows)
    return torch.cat([_vote(chunk @ bank, labels, k, temperature, classes) for chunk in chunks])


def _vote(similarity: Tensor, labels: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """The winning class of each row of similarities (rows, n)."""
    nearest, index = similarity.topk(k, dim=1)
    # softmax is exp(similarity / T) over a factor common to the row: same winner, no overflow at small T
    weights = (nearest / temperature).softmax(dim=1)
    votes = weights.new_zeros(len(similarity), classes).scatter_add_(1, labels[index], weights)
    return votes.argmax(dim=1)
