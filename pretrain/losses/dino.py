"""Cross-entropy between the class tokens of crops of one image (the DINO loss)."""

import torch
from torch import Tensor

from pretrain.losses.cross_entropy import TargetRows


def dino_targets(teacher: Tensor, num_local: int) -> TargetRows:
    """The targets of the student's crops, the global ones first, crop-major.

    Each student crop predicts the target of every teacher crop other than itself. Cross-entropy is linear in
    its target, so a local crop meets the sum of both targets once.

    Args:
        teacher: (2, B, K) probabilities.
        num_local: local crops an image, L.

    Returns:
        (2 B + L B) rows.
    """
    size = teacher.shape[1]
    table = torch.cat([teacher.flip(0), teacher.sum(0, keepdim=True)]).flatten(0, 1)  # (3 B, K)
    places = torch.arange(3 * size, device=table.device)
    index = torch.cat([places[: 2 * size], places[2 * size :].repeat(num_local)])
    return TargetRows(len(index), lambda block: table[index[block]])


def dino_losses(terms: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The global and the local term, each weighted so that their sum is the mean over all crop pairs.

    There are 2 global pairs and 2 L local ones per image.

    Args:
        terms: (2 B + L B,) cross-entropies of the global crops, then of the local ones with the sum of both
            targets; rows as `dino_targets` orders them.
        size: images, B.

    Returns:
        (global term, local term), scalars.
    """
    by_crop = terms.unflatten(0, (-1, size)).mean(1)  # (2 + L,)
    num_pairs = 2 + 2 * (len(by_crop) - 2)
    return by_crop[:2].sum() / num_pairs, by_crop[2:].sum() / num_pairs
