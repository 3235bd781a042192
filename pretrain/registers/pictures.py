"""Patches of a few images under each condition, as colours in one basis."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pretrain.analysis import plots
from pretrain.analysis.maps import PatchPca
from pretrain.analysis.marks import shown_pixels
from pretrain.analysis.page import Picture
from pretrain.analysis.scaling import Scaling
from pretrain.models.vit import VisionTransformer
from pretrain.registers.interventions import Intervention
from pretrain.registers.looks import FULL, features
from pretrain.registers.samples import Batch


@dataclass(frozen=True)
class Pictured:
    """A few images, and the output patch tokens that conditions give them."""

    pixels: Tensor  # (n, 3, s, s) from 0 to 1
    patches: dict[str, Tensor]  # (n, N, D) by condition, the full model first


def pictured(
    backbone: VisionTransformer, batch: Batch, interventions: Mapping[str, Intervention], scaling: Scaling
) -> Pictured:
    """Of one batch."""
    found = {
        name: features(backbone, batch.pixels, batch.keys, intervention)[0].patches.float().cpu()
        for name, intervention in {FULL: None, **interventions}.items()
    }
    return Pictured(shown_pixels(batch.pixels, scaling), found)


def picture_table(shown: Pictured) -> tuple[list[str], list[list[Picture]]]:
    """Titles of columns, and rows of pictures: the image, then each condition in the full model's basis."""
    basis = PatchPca.fit(shown.patches[FULL])
    columns = {"image": shown.pixels} | {name: basis.project(own) for name, own in shown.patches.items()}
    rows = [
        [(plots.png(column[row]), f"{name}, image {row + 1}") for name, column in columns.items()]
        for row in range(len(shown.pixels))
    ]
    return list(columns), rows
