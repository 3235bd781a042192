"""Retrieval against loops."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from pretrain.analysis import retrieval
from pretrain.analysis.retrieval import retrieve


def naive(gallery, gallery_labels, query, label) -> tuple[bool, float]:
    similar = [float(cosine_similarity(query, row, dim=0)) for row in gallery]
    ranked = sorted(range(len(gallery)), key=lambda i: -similar[i])
    found, shares = 0, []
    for rank, index in enumerate(ranked, start=1):
        if gallery_labels[index] == label:
            found += 1
            shares.append(found / rank)
    return bool(gallery_labels[ranked[0]] == label), sum(shares) / len(shares) if shares else 0.0


def test_it_equals_a_loop_over_queries(monkeypatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", 30 * 4)  # several chunks
    generator = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(30, 5, generator=generator), torch.randn(11, 5, generator=generator)
    labels, asked = torch.arange(30) % 3, torch.arange(11) % 4  # class 3 is not in the gallery
    found = retrieve(gallery, labels, queries * 7, asked)
    expected = [naive(gallery, labels, *query) for query in zip(queries, asked, strict=True)]
    assert found.hit.tolist() == [hit for hit, _ in expected]
    assert found.precision.tolist() == pytest.approx([value for _, value in expected])
    assert found.precision[asked == 3].sum() == 0
    by_class = [found.precision[asked == label].mean() for label in range(4)]
    assert float(found.over_classes().mean()) == pytest.approx(float(torch.stack(by_class).mean()))


def test_features_that_tell_the_class_rank_it_first() -> None:
    labels = torch.arange(40) % 4
    rows = torch.eye(4)[labels] + 0.1 * torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    found = retrieve(rows[:20], labels[:20], rows[20:], labels[20:])
    assert found.hit.all() and found.precision.min() == pytest.approx(1)
