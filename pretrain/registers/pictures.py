"""Patches of a few images under each condition, as colours in one basis."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pretrain.analysis import plots
from pretrain.analysis.images import MEAN, STD
from pretrain.analysis.maps import PatchPca
from pretrain.analysis.page import Picture
from pretrain.models.vit import VisionTransformer
from pretrain.registers.interventions import Intervention
from pretrain.registers.looks import FULL, features
from pretrain.registers.samples import Batch

SHOWN = 224  # pixels of a picture of an image


@dataclass(frozen=True)
class Pictured:
    """A few images, and the output patch tokens that conditions give them."""

    pixels: Tensor  # (n, 3, S, S) normalised
    patches: dict[str, Tensor]  # (n, N, D) by condition, the full model first


def pictured(
    backbone: VisionTransformer, batch: Batch, interventions: Mapping[str, Intervention]
) -> Pictured:
    """Of one batch."""
    found = {
        name: features(backbone, batch.pixels, batch.keys, intervention)[0].patches.float().cpu()
        for name, intervention in {FULL: None, **interventions}.items()
    }
    return Pictured(batch.pixels, found)


def picture_table(shown: Pictured) -> tuple[list[str], list[list[Picture]]]:
    """Titles of columns, and rows of pictures: the image, then each condition in the full model's basis."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    pixels = (shown.pixels * std + mean).clamp(0, 1)
    if pixels.shape[-1] > SHOWN:
        pixels = interpolate(pixels, size=SHOWN, mode="bilinear", antialias=True)
    basis = PatchPca.fit(shown.patches[FULL])
    columns = {"image": pixels} | {name: basis.project(own) for name, own in shown.patches.items()}
    rows = [
        [(plots.png(column[row]), f"{name}, image {row + 1}") for name, column in columns.items()]
        for row in range(len(pixels))
    ]
    return list(columns), rows
