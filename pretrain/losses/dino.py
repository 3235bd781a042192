"""Cross-entropy between the class tokens of crops of one image (the DINO loss)."""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, temp: float) -> Tensor:
    """-sum_k t_k log softmax(s / temp)_k per row, for targets that sum to any constant: (..., K) to (...)."""
    scaled = logits / temp
    return targets.sum(-1) * torch.logsumexp(scaled, dim=-1) - (targets * scaled).sum(-1)


def dino_losses(
    student_global: Tensor, student_local: Tensor, targets: Tensor, temp: float
) -> tuple[Tensor, Tensor]:
    """The global and the local term, each weighted so that their sum is the mean over all crop pairs.

    Each student crop predicts the target of every teacher crop other than itself: 2 global pairs and 2 L
    local ones per image. Cross-entropy is linear in its target, so a local crop meets the sum of both targets
    once.

    Args:
        student_global: (2, B, K) logits.
        student_local: (L, B, K) logits.
        targets: (2, B, K) teacher probabilities.
        temp: student temperature.

    Returns:
        (global term, local term), scalars.
    """
    num_pairs = 2 + 2 * len(student_local)
    global_terms = cross_entropy(student_global, targets.flip(0), temp)  # (2, B)
    local_terms = cross_entropy(student_local, targets.sum(0), temp)  # (L, B)
    return global_terms.mean(1).sum() / num_pairs, local_terms.mean(1).sum() / num_pairs
