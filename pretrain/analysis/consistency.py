"""Does attention follow what an image shows: maps of moved images, moved back, against those of the image."""

from collections.abc import Callable

import torch
from torch import Tensor

CROP = 0.75  # of the side, in whole patches; a crop lies at each corner
SMALLEST_CROPPED = 3  # patches at a side; of fewer a crop is all, or a single one
Maps = Callable[[Tensor], Tensor]  # images (n, C, S, S) to maps (n, H, h, h)


def consistency(maps_of: Maps, images: Tensor) -> dict[str, Tensor]:
    """Pearson correlation with the maps of the untouched images, mean over heads: (n,) for each move.

    `flip`: left and right exchanged. `rotation`: by 90, 180 and 270 degrees, their mean. `crop`: parts of
    the image, in their own size, on the patches they share with the whole; mean of four. All are whole
    patches: nothing is resampled; a grid below 3 x 3 is not cropped. `other image`: the map of the next
    image instead, which shows what a common place, such as the middle, is worth.

    Args:
        maps_of: what a model attends to.
        images: (n, C, S, S), two or more.
    """
    plain = maps_of(images)
    flipped = maps_of(images.flip(-1)).flip(-1)
    turned = [maps_of(images.rot90(k, (-2, -1))).rot90(-k, (-2, -1)) for k in (1, 2, 3)]
    found = {
        "flip": pearson(plain, flipped),
        "rotation": torch.stack([pearson(plain, back) for back in turned]).mean(dim=0),
    }
    if plain.shape[-1] >= SMALLEST_CROPPED:
        found["crop"] = _crops(maps_of, images, plain)
    return {**found, "other image": pearson(plain, plain.roll(1, dims=0))}


def _crops(maps_of: Maps, images: Tensor, plain: Tensor) -> Tensor:
    patches = plain.shape[-1]
    patch, side = images.shape[-1] // patches, max(2, round(CROP * patches))
    ends = sorted({0, patches - side})
    scores = []
    for top in ends:
        for left in ends:
            rows, cols = slice(top, top + side), slice(left, left + side)
            pixels = images[..., patch * top : patch * (top + side), patch * left : patch * (left + side)]
            scores.append(pearson(plain[..., rows, cols], maps_of(pixels)))
    return torch.stack(scores).mean(dim=0)


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of maps (n, H, h, w) over their patches, mean over heads: (n,); 0 for an even map."""
    one, two = (maps.double().flatten(2) for maps in (first, second))
    one, two = (maps - maps.mean(dim=2, keepdim=True) for maps in (one, two))
    scale = (one.square().sum(dim=2) * two.square().sum(dim=2)).sqrt()
    return ((one * two).sum(dim=2) / scale.clamp(min=1e-300)).mean(dim=1).float().cpu()
