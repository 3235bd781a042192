"""KoLeo regulariser: spread the features of a group of images (Sablayrolles et al. 2019)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

EPS = 1e-8


def koleo_of_crops(cls: Tensor, group_size: int) -> Tensor:
    """Of class tokens (2 B, D), crop-major: the mean over the groups, summed over the two global crops."""
    return koleo_loss(cls.unflatten(0, (2, -1, group_size))).mean(1).sum()


def koleo_loss(features: Tensor) -> Tensor:
    """-mean log distance to the nearest neighbour within each group of n features: (..., n, D) to (...).

    In fp32 whatever autocast says: 1e-8 is 0 in half precision, and duplicates would give an infinite loss. A
    group of one image has no neighbour; its loss is 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        x = normalize(features.float(), dim=-1, eps=EPS)
        if x.shape[-2] < 2:
            return x.sum(dim=(-2, -1)) * 0
        with torch.no_grad():
            similarity = x @ x.transpose(-2, -1)
            similarity.diagonal(dim1=-2, dim2=-1).fill_(-1)
            nearest = similarity.argmax(dim=-1, keepdim=True).expand_as(x)
        distance = (x - x.gather(-2, nearest) + EPS).norm(dim=-1)
        return -(distance + EPS).log().mean(dim=-1)
