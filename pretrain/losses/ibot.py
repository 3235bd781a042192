"""Cross-entropy on masked patches (the iBOT loss)."""

from torch import Tensor

from pretrain.losses.dino import cross_entropy


def ibot_loss(student: Tensor, targets: Tensor, weights: Tensor, num_crops: int, temp: float) -> Tensor:
    """Weighted cross-entropy summed over masked patches, per global crop, masked or not.

    Args:
        student: (M, K) logits of the student's masked patches.
        targets: (M, K) teacher probabilities of the same patches, seen unmasked.
        weights: (M,) 1 / masked patches of the same crop; 0 for padding.
        num_crops: 2B.
        temp: student temperature.
    """
    return (weights * cross_entropy(student, targets, temp)).sum() / num_crops
