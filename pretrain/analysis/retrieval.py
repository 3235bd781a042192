"""Retrieval: do the most similar images of a gallery show the same class."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 2**24  # similarities sorted at a time: 64 MiB, and the order of as many


@dataclass(frozen=True)
class Retrieval:
    """Of m queries, on the CPU."""

    hit: Tensor  # (m,) bool: the most similar image has the query's class
    precision: Tensor  # (m,) average precision, from 0 to 1; 0 where the gallery lacks the class
    labels: Tensor  # (m,) of the queries

    def over_classes(self) -> Tensor:
        """Average precisions weighted so that their mean is the mean over classes: mAP; (m,)."""
        _, inverse, counts = self.labels.unique(return_inverse=True, return_counts=True)
        return self.precision * len(self.labels) / (len(counts) * counts[inverse])


def retrieve(gallery: Tensor, gallery_labels: Tensor, queries: Tensor, query_labels: Tensor) -> Retrieval:
    """Rank the whole gallery by cosine for each query.

    Average precision: the mean, over the images of the query's class, of the share of that class among all
    images ranked as high or higher.

    Args:
        gallery: (n, D), any scale.
        gallery_labels: (n,).
        queries: (m, D), none of them in the gallery.
        query_labels: (m,).
    """
    bank, rows = normalize(gallery.float(), dim=1).T, max(1, CHUNK // len(gallery))
    ranks = torch.arange(1, len(gallery) + 1, device=gallery.device)
    hits, precisions = [], []
    for chunk, labels in zip(queries.split(rows), query_labels.split(rows), strict=True):
        order = (normalize(chunk.float(), dim=1) @ bank).argsort(dim=1, descending=True)
        same = gallery_labels[order] == labels[:, None]
        shares = same.cumsum(dim=1) / ranks
        hits.append(same[:, 0])
        precisions.append((shares * same).sum(dim=1) / same.sum(dim=1).clamp(min=1))
    return Retrieval(torch.cat(hits).cpu(), torch.cat(precisions).cpu(), query_labels.cpu())
