"""Which patch tokens are defective by their angle to the predicted direction; norms: analysis.outliers."""

import torch
from torch import Tensor

ANGLE_THRESHOLD = 4.0  # standard deviations above the mean (paper and released code)
MIN_PATCHES = 196  # of the angle criterion: fewer than 17 can never be 4 deviations above their own mean
# |cos| with the prediction from which a token lies along it. The paper's criterion is relative to the image:
# where many patches lean towards the direction it asks for more than 1 and sees nothing.
ALIGNED = 0.5


def alignment(tokens: Tensor, direction: Tensor) -> Tensor:
    """|cos| between tokens (..., D) and a direction (D,), as (...)."""
    unit = direction.to(tokens.dtype) / direction.norm().to(tokens.dtype)
    return (tokens @ unit).abs() / tokens.norm(dim=-1).clamp(min=1e-12)


def defective_by_angle(cosines: Tensor, threshold: float = ANGLE_THRESHOLD, border: int = 0) -> Tensor:
    """Patches whose |cos| stands out among those of their image: above mean + threshold * deviation.

    Args:
        cosines: (B, h, w).
        threshold: in unbiased standard deviations over all patches of the image.
        border: rows and columns at each side that never count as defective; they do count in mean and
            deviation.

    Returns:
        (B, h, w) bool.
    """
    flat = cosines.flatten(1)
    limit = flat.mean(dim=1) + threshold * flat.std(dim=1)
    found = cosines > limit[:, None, None]
    if border:
        inner = torch.zeros_like(found)
        inner[:, border:-border, border:-border] = found[:, border:-border, border:-border]
        return inner
    return found
