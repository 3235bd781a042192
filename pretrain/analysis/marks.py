"""Images as pictures, with places marked."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pretrain.analysis.scaling import Scaling

SHOWN = 224  # pixels of a picture of an image
MARK = torch.tensor([1.0, 0.1, 0.1]).view(3, 1, 1)
DIMMED = 0.7  # brightness of what is not marked


def shown_pixels(images: Tensor, scaling: Scaling) -> Tensor:
    """(n, C, S, S) normalised to RGB (n, 3, s, s) from 0 to 1, s at most SHOWN."""
    size = min(SHOWN, images.shape[-1])
    return interpolate(scaling.shown(images), size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)


def marked(image: Tensor, places: Tensor) -> Tensor:
    """An image (3, s, s) in dim grey with the places of a mask (h, w) in one colour."""
    mask = interpolate(places[None, None].float(), size=image.shape[-2:], mode="nearest")[0]
    return DIMMED * image.mean(dim=0, keepdim=True) * (1 - mask) + MARK * mask
