"""Cross-entropy on masked patches (the iBOT loss)."""

from torch import Tensor


def ibot_loss(terms: Tensor, weights: Tensor, num_crops: int) -> Tensor:
    """Weighted cross-entropy summed over masked patches, per global crop, masked or not.

    Args:
        terms: (M,) cross-entropies of the student's masked patches with the teacher's view of them unmasked.
        weights: (M,) 1 / masked patches of the same crop; 0 for padding.
        num_crops: 2B.
    """
    return (weights * terms).sum() / num_crops
