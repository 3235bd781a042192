"""The loss that pulls a defective patch token towards a mean of its neighbours (paper, section 3.3)."""

import torch
from torch import Tensor
from torch.nn.functional import unfold

TEMPERATURE = 0.1  # of exp(-|cos| / temperature): aligned neighbours count less
GAUSSIANS = {
    3: torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16,
    5: torch.tensor(
        [[1.0, 4, 7, 4, 1], [4, 16, 26, 16, 4], [7, 26, 41, 26, 7], [4, 16, 26, 16, 4], [1, 4, 7, 4, 1]]
    )
    / 273,
}


@torch.no_grad()
def smooth_targets(tokens: Tensor, cosines: Tensor, kernel: int) -> Tensor:
    """What each patch that has a whole window around it would be without a defect.

    Args:
        tokens: (B, h, w, D) patch tokens.
        cosines: (B, h, w) their |cos| to the predicted direction.
        kernel: side of the window, 3 or 5.

    Returns:
        (B, h - kernel + 1, w - kernel + 1, D), without gradient.
    """
    batch, rows, cols, dim = tokens.shape
    chance = torch.exp(-cosines / TEMPERATURE).unsqueeze(1)
    weights = unfold(chance, kernel)  # (B, k * k, L)
    weights = weights / weights.sum(dim=1, keepdim=True)
    weights = weights * GAUSSIANS[kernel].to(weights).flatten()[:, None]
    weights = weights / weights.sum(dim=1, keepdim=True)
    height, width = rows - kernel + 1, cols - kernel + 1
    targets = tokens.new_zeros(batch, height, width, dim)
    for index in range(kernel * kernel):  # window by window: unfolding the tokens would take k * k times them
        top, left = divmod(index, kernel)
        share = weights[:, index].view(batch, height, width, 1)
        targets += share * tokens[:, top : top + height, left : left + width]
    return targets


def smooth_loss(tokens: Tensor, cosines: Tensor, defective: Tensor, kernel: int) -> Tensor:
    """Mean distance of the defective tokens to their targets, over the mean norm of the image's inner tokens.

    Args:
        tokens: (B, h, w, D), with gradient.
        cosines: (B, h, w).
        defective: (B, h, w) bool, none in the border of kernel // 2, at least one in each image.
        kernel: 3 or 5.

    Returns:
        (B,) one loss an image.
    """
    border = kernel // 2
    inner = tokens[:, border:-border, border:-border]
    mask = defective[:, border:-border, border:-border]
    targets = smooth_targets(tokens.detach(), cosines, kernel)
    scale = inner.detach().norm(dim=-1).mean(dim=(1, 2))
    distances = torch.where(mask, (inner - targets).square().sum(dim=-1), 1.0).sqrt()
    return torch.where(mask, distances, 0.0).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)) / scale
