"""Patch tokens far longer than the others of their image: what artifacts look like without labels."""

from torch import Tensor

NORM_THRESHOLD = 8.0  # median absolute deviations above the median


def norm_limits(norms: Tensor, threshold: float = NORM_THRESHOLD) -> Tensor:
    """Median + threshold * median absolute deviation of each image: of norms (B, ...) as (B, 1, ...)."""
    flat = norms.flatten(1)
    middle = flat.median(dim=1).values
    deviation = (flat - middle[:, None]).abs().median(dim=1).values
    limits = middle + threshold * deviation.clamp(min=1e-12)
    return limits.view(-1, *[1] * (norms.ndim - 1))


def norm_outliers(norms: Tensor, threshold: float = NORM_THRESHOLD) -> Tensor:
    """Patches whose norm is above the limit of their image.

    Args:
        norms: (B, ...).
        threshold: in median absolute deviations.

    Returns:
        (B, ...) bool.
    """
    return norms > norm_limits(norms, threshold)
