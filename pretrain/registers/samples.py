"""The images of an experiment: which are scored, which fit probes, which calibrate; read batch by batch."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.analysis.images import ImageSet, Stored
from pretrain.errors import InputError


class Split(NamedTuple):
    """Indices of images; no two parts share one."""

    test: list[int]
    train: list[int]  # probes are fitted on
    calibration: list[int]


class Batch(NamedTuple):
    """B images in a row."""

    indices: list[int]
    keys: list[str]  # hashes of the bytes: an image's draws do not depend on where it lies
    labels: list[int | None]
    pixels: Tensor  # (B, C, S, S) normalised


def split(images: ImageSet, seed: int, test: int, train: int, calibration: int) -> Split:
    """Parts of the seeded order: first what is evaluated, then what calibrates.

    Raises:
        InputError: there are too few images.
    """
    wanted = test + train + calibration
    if len(images) < wanted:
        parts = f"{test} scored, {train} for probes, {calibration} for calibration"
        raise InputError(
            f"--images: {images.source} holds {len(images)} images, {wanted} are asked for ({parts})"
        )
    order = images.drawn(seed, wanted)
    return Split(order[:test], order[test : test + train], order[test + train :])


def batches(
    images: ImageSet, indices: Sequence[int], size: int, without: Collection[str] = ()
) -> Iterator[Batch]:
    """Batches of the undamaged ones of these images; no last image is left alone if there are others.

    Args:
        images: the set.
        indices: of images.
        size: of a batch.
        without: keys of images that are left out.
    """
    waiting: list[tuple[int, str, int | None, Tensor]] = []
    for index in indices:
        stored, key = _stored(images, index)
        if stored is None or key in without:
            continue
        pixels = images.decoded(stored)
        if pixels is not None:
            waiting.append((index, key, stored.label, pixels))
        if len(waiting) == size + min(size, 2):  # two stay back, of which neither can end alone
            yield _batch(waiting[:size])
            del waiting[:size]
    while waiting:
        rest = len(waiting) if len(waiting) <= size + (size > 1) else size
        yield _batch(waiting[:rest])
        del waiting[:rest]


def keys(images: ImageSet, indices: Sequence[int]) -> set[str]:
    """Keys of images, damaged ones too."""
    return {_stored(images, index)[1] for index in indices}


def _stored(images: ImageSet, index: int) -> tuple[Stored | None, str]:
    try:
        stored = images.stored(index)
    except (ValueError, OSError) as error:
        images.damaged.append(f"image {index}: {error}")
        return None, ""
    return stored, hashlib.blake2b(stored.content, digest_size=16).hexdigest()


def _batch(rows: Sequence[tuple[int, str, int | None, Tensor]]) -> Batch:
    indices, names, labels, pixels = zip(*rows, strict=True)
    return Batch(list(indices), list(names), list(labels), torch.stack(pixels))
