"""Linear probes and nearest neighbours of pooled features, image by image: conditions can be paired."""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

ITERATIONS = 1000  # of lbfgs; it usually ends earlier
ROWS = 1024  # similarities are held of so many images at a time


def fit_probe(features: Tensor, labels: Tensor) -> Pipeline:
    """A linear classifier of features (n, D) for labels (n,) of two or more classes."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS))
    return probe.fit(features.numpy(), labels.numpy())


def probe_hits(probe: Pipeline, features: Tensor, labels: Tensor) -> Tensor:
    """100 where the probe is right and 0 where it is wrong, (m,) fp64."""
    return 100 * torch.from_numpy(probe.predict(features.numpy()) == labels.numpy()).double()


def recall_at_one(features: Tensor, labels: Tensor) -> Tensor:
    """100 where the most similar other image has the same label, else 0: (m, D), (m,) to (m,) fp64.

    NaN where there is no other image.
    """
    if len(features) == 1:
        return torch.full((1,), torch.nan, dtype=torch.float64)
    rows, nearest = normalize(features.float(), dim=-1), []
    for start in range(0, len(rows), ROWS):
        similarity = rows[start : start + ROWS] @ rows.T
        itself = torch.arange(start, start + len(similarity))
        similarity[torch.arange(len(similarity)), itself] = -torch.inf
        nearest.append(similarity.argmax(dim=1))
    return 100 * (labels[torch.cat(nearest)] == labels).double()
