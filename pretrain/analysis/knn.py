"""Weighted k-nearest-neighbour classification of frozen features, as DINO and DINOv2 report it."""

from collections.abc import Callable, Iterable, Sequence

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
    found = ((chunk @ bank).topk(k, dim=1) for chunk in chunks)
    return torch.cat([_vote(nearest, labels[index], temperature, classes) for nearest, index in found])


def knn_predict_streamed(
    train_blocks: Callable[[], Iterable[Tensor]],
    train_labels: Tensor,
    test_blocks: Iterable[Tensor],
    counts: Sequence[int],
    temperature: float = 0.07,
) -> Tensor:
    """What `knn_predict` gives for several k, (len(counts), m), from rows of which one block is in memory.

    Args:
        train_blocks: a new pass over training rows (b, D), in the order of the labels.
        train_labels: (n,) integers from 0.
        test_blocks: test rows (q, D); for each block there is one pass over the training rows.
        counts: values of k, 1 to n.
        temperature: T.
    """
    labels, classes = train_labels.to(torch.int64), int(train_labels.max()) + 1
    found = []
    for queries in test_blocks:
        nearest, index = _nearest(F.normalize(queries.float(), dim=1), train_blocks(), max(counts))
        votes = [_vote(nearest[:, :k], labels[index[:, :k]], temperature, classes) for k in counts]
        found.append(torch.stack(votes))
    return torch.cat(found, dim=1)


def _nearest(queries: Tensor, blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Similarities and numbers (q, k) of the rows most similar to each query, the most similar first."""
    best, first = queries.new_empty(len(queries), 0), 0
    index = torch.empty(len(queries), 0, dtype=torch.int64)
    for block in blocks:
        for part in F.normalize(block.float(), dim=1).split(max(1, CHUNK // len(queries))):
            near, rows = (queries @ part.T).topk(min(k, len(part)), dim=1)
            best, place = torch.cat([best, near], dim=1).topk(min(k, best.shape[1] + near.shape[1]), dim=1)
            index = torch.cat([index, rows + first], dim=1).gather(1, place)
            first += len(part)
    return best, index


def _vote(nearest: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """The winning class of each row of similarities and labels (rows, k) of the nearest."""
    # softmax is exp(similarity / T) over a factor common to the row: same winner, no overflow at small T
    weights = (nearest / temperature).softmax(dim=1)
    votes = weights.new_zeros(len(nearest), classes).scatter_add_(1, labels, weights)
    return votes.argmax(dim=1)
