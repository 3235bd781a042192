"""Sample images as each model sees them: norms of the patches, defective ones marked, main components."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pretrain.analysis import plots
from pretrain.analysis.maps import PatchPca
from pretrain.analysis.marks import marked
from pretrain.analysis.page import Picture
from pretrain.sinder.comparison import Subject
from pretrain.sinder.diagnosis import worst_layer
from pretrain.sinder.held_out import Original
from pretrain.sinder.look import Look


def worst_block(subject: Subject) -> int:
    """The block after which most patches are defective; of a clean model the last one."""
    layers = subject.diagnosis.layers
    worst = worst_layer(layers)
    return worst if layers[worst].by_both else len(layers) - 1


def telling_blocks(subject: Subject) -> list[int]:
    """Before the first defect, at it, at the worst block, and the last one."""
    first, last, worst = subject.diagnosis.first_layer, len(subject.directions) - 1, worst_block(subject)
    return sorted({last // 2, worst, last} if first is None else {max(first - 1, 0), first, worst, last})


def picture_table(subjects: Sequence[Subject], pixels: Tensor) -> tuple[list[str], list[list[Picture]]]:
    """Titles of columns, and a row of pictures for each image.

    Args:
        subjects: with their looks, of which `pixels` show the first; the first subject's thresholds count.
        pixels: (n, 3, s, s) from 0 to 1.
    """
    looks = [subject.seen for subject in subjects if subject.seen is not None]
    basis = PatchPca.fit(torch.cat([seen.patches[: len(pixels)].flatten(1, 2) for seen in looks]))
    original, worst = Original(looks[0]), worst_block(subjects[0])
    blocks = telling_blocks(subjects[0]) if len(subjects) == 1 else [worst]
    defective = [original.by_both(seen)[:, worst] for seen in looks]
    columns: dict[str, Iterable[Tensor]] = {"image": pixels}
    names = [f"{subject.name}: " if len(subjects) > 1 else "" for subject in subjects]
    for block in blocks:
        for name, seen in zip(names, looks, strict=True):
            columns[f"{name}norm after block {block}"] = _norms(looks, seen, block, len(pixels))
    for name, marks in zip(names, defective, strict=True):
        columns[f"{name}marked"] = map(marked, pixels, marks)
    for name, seen in zip(names, looks, strict=True):
        columns[f"{name}PCA"] = _pca(basis, seen, len(pixels))
    cells = [
        [(plots.png(drawn), f"{title}, image {i}") for i, drawn in enumerate(column)]
        for title, column in columns.items()
    ]
    return list(columns), [list(row) for row in zip(*cells, strict=True)]


def _norms(looks: Sequence[Look], seen: Look, block: int, number: int) -> Iterator[Tensor]:
    """Maps of the first images, each in a range that all models share."""
    for image in range(number):
        highest = max(float(other.norms[image, block].max()) for other in looks)
        yield plots.heat(seen.norms[image, block], 0, highest)


def _pca(basis: PatchPca, seen: Look, number: int) -> Tensor:
    tokens = seen.patches[:number]
    return basis.project(tokens.flatten(1, 2), (tokens.shape[1], tokens.shape[2]))
