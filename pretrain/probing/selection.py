"""Which images fit a probe and which choose its place: never those that report it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import InputError
from pretrain.probing.preprocessing import Ints
from pretrain.seeding import numpy_stream

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """Numbers of images, ascending; together all, none in both."""

    train: Ints
    validation: Ints


def split(
    labels: Sequence[int] | Ints, share: float, seed: int, groups: Sequence[Hashable] | None = None
) -> Split:
    """Training and validation images by a seeded permutation, in equal proportions of the classes.

    A class of two or more images is on both sides; with groups, every class that a group can leave without
    emptying it. Groups come whole, in a seeded order, to the side that needs their classes: proportions are
    then as good as the groups allow.

    Args:
        labels: (n,) class of each image.
        share: of the images that are for validation, 0 to 1.
        seed: of the permutation.
        groups: (n,) of each image: a patient, a slide.

    Raises:
        InputError: a side would be empty, or labels and groups differ in number.
    """
    if not 0 < share < 1:
        raise InputError(f"share={share}: must be between 0 and 1, the part of the images for validation")
    targets = np.unique(labels, return_inverse=True)[1]
    validation = _single(targets, share, seed) if groups is None else _grouped(targets, share, seed, groups)
    if not 0 < validation.sum() < len(targets):
        unit = "images" if groups is None else f"groups ({len(set(groups))})"
        raise InputError(f"{len(targets)} images: too few {unit} for {share:.0%} validation; give more")
    return Split(np.flatnonzero(~validation), np.flatnonzero(validation))


def _single(targets: Ints, share: float, seed: int) -> Bools:
    """Whether each image is for validation."""
    order = numpy_stream(seed, "probe-split").permutation(len(targets))
    validation = np.zeros(len(targets), bool)
    for target, number in enumerate(_numbers(np.bincount(targets), share)):
        validation[order[targets[order] == target][:number]] = True
    return validation


def _numbers(counts: Ints, share: float) -> Ints:
    """Validation images of each class: the nearest whole numbers to the share that give the nearest sum."""
    wanted = share * counts
    numbers = np.floor(wanted).astype(np.int64)
    missing = round(float(wanted.sum())) - int(numbers.sum())
    numbers[np.argsort(numbers - wanted, kind="stable")[:missing]] += 1
    least = np.where(counts > 1, 1, 0)
    return np.clip(numbers, least, np.maximum(counts - 1, 0))


def _grouped(targets: Ints, share: float, seed: int, groups: Sequence[Hashable]) -> Bools:
    if len(groups) != len(targets):
        raise InputError(f"{len(groups)} groups for {len(targets)} labels; give each image one of both")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    members = np.array([numbers[name] for name in groups])
    order, ends = np.argsort(members, kind="stable"), np.cumsum(np.bincount(members))
    total = np.bincount(targets)
    taken, inside = np.zeros_like(total), np.zeros(len(numbers), bool)
    for group in numpy_stream(seed, "probe-split").permutation(len(numbers)):
        own = order[ends[group - 1] if group else 0 : ends[group]]
        after = taken + np.bincount(targets[own], minlength=len(total))
        nearer = ((after - share * total) ** 2).sum() < ((taken - share * total) ** 2).sum()
        if nearer and (after < total).all():
            taken, inside[group] = after, True
    chosen: Bools = inside[members]
    return chosen


def check_disjoint(groups_train: Sequence[Hashable], groups_test: Sequence[Hashable]) -> None:
    """Refuse to test on images of a group that a probe was fitted on.

    Args:
        groups_train: of the images that fit or choose a probe.
        groups_test: of those that report it.

    Raises:
        InputError: a group is in both.
    """
    known = set(groups_train)
    shared = [name for name in dict.fromkeys(groups_test) if name in known]
    if shared:
        others = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise InputError(f"group {shared[0]!r}{others}: in training and test images; take it out of one")
