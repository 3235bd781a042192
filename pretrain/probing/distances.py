"""How far sets of images lie from those that probes are fitted on, in the features of one place."""

from collections.abc import Mapping

import numpy as np
import torch

from pretrain.analysis.knn import knn_accuracy
from pretrain.analysis.page import Table
from pretrain.analysis.taps import Place
from pretrain.probing.experiment import Part
from pretrain.probing.preprocessing import Floats
from pretrain.probing.shifts import frechet_distance, knn_drop, linear_mmd, proxy_a_distance
from pretrain.probing.store import Pool
from pretrain.seeding import numpy_stream

IMAGES = 2_000  # of each set, drawn: the distances of Gaussians depend on how many there are
NEIGHBOURS = 20
FEWEST = 4  # images of a set; of fewer there are no distances


def shift_table(fit: Part, tests: Mapping[str, Part], place: Place, pool: Pool, seed: int) -> Table:
    """A row per test set, without distances where it is too small; the k-NN drop is against the first set.

    Args:
        fit: that probes are fitted on.
        tests: by name.
        place: of the features.
        pool: of the tokens.
        seed: of the images that are drawn.
    """
    source, labels = _drawn(fit, place, pool, seed)
    scores: list[float] = []
    rows = []
    for name, part in tests.items():
        target, classes = _drawn(part, place, pool, seed)
        k = min(NEIGHBOURS, len(source))
        bank, queries = torch.from_numpy(source), torch.from_numpy(target)
        found = knn_accuracy(bank, torch.from_numpy(labels), queries, torch.from_numpy(classes), k)
        scores.append(found)
        rows.append(
            [
                name,
                *_distances(source, target, seed),
                f"{scores[0]:.1f} -> {found:.1f}" if name != next(iter(tests)) else f"{found:.1f}",
                f"{knn_drop(scores[0], found):.1f}",
            ]
        )
    heads = ["set", "proxy A-distance", "Frechet distance", "linear MMD", "k-NN accuracy %", "k-NN drop"]
    return Table(heads, rows)


def _distances(source: Floats, target: Floats, seed: int) -> tuple[str, str, str]:
    if min(len(source), len(target)) < FEWEST:
        return "-", "-", "-"
    return (
        f"{proxy_a_distance(source, target, seed):.2f}",
        f"{frechet_distance(source, target):.3g}",
        f"{linear_mmd(source, target):.3g}",
    )


def _drawn(part: Part, place: Place, pool: Pool, seed: int) -> tuple[Floats, np.ndarray]:
    """Some images of a part: features (n, D') and classes (n,)."""
    number = part.features.contents.images
    rows = np.arange(number) if part.rows is None else part.rows
    if len(rows) > IMAGES:
        chosen = numpy_stream(seed, "shift-images").permutation(len(rows))[:IMAGES]
        rows = rows[np.sort(chosen)]
    return part.features.features(place, pool, rows).read(), part.features.labels[rows]
