"""What a comparison of models is told about its images: classes of shards, and masks beside the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.analysis.features import knn_scores
from pretrain.analysis.segmentation import SegmentationScores, linear_segmentation
from pretrain.config.schema import KnnConfig
from pretrain.data.labelled import centre_crop, labelled_batches
from pretrain.errors import InputError, first_line
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.images import MEAN, STD, ImageSet
from pretrain.sinder.look import Look

KNN_CROP, KNN_RESIZE = 224, 256  # pixels, as DINOv2 evaluates; the crop is cut to whole patches


@dataclass(frozen=True)
class Labels:
    """What there is; empty where nothing was given."""

    knn_train: Sequence[str] = ()  # shards with classes
    knn_test: Sequence[str] = ()
    masks: Tensor | None = None  # (n, S, S) classes of the pixels of the compared images


def knn(backbone: VisionTransformer, labels: Labels, batch_size: int) -> dict[str, float] | None:
    """Accuracy in percent of class token and mean patch, or None without labelled shards.

    Raises:
        InputError: a shard cannot be used, or has no labels.
    """
    if not labels.knn_train:
        return None
    device, patch = next(backbone.parameters()).device, backbone.patch_size
    crop = max(1, KNN_CROP // patch) * patch
    cfg = KnnConfig(train=list(labels.knn_train), test=list(labels.knn_test), batch_size=batch_size)

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        seen = backbone([images.to(device)])[0]
        return seen.cls, seen.patches

    train, test = (
        labelled_batches(shards, f"--knn-{name}", max(KNN_RESIZE, crop), crop, MEAN, STD, batch_size)
        for name, shards in (("train", cfg.train), ("test", cfg.test))
    )
    scores = knn_scores(features, train, test, cfg)
    return {name.removeprefix("knn/"): value for name, value in scores.items()}


def segmentation(seen: Look, labels: Labels) -> SegmentationScores | None:
    """A linear probe on the first half of the images, scored on the second, or None without masks."""
    if labels.masks is None:
        return None
    half = len(seen.patches) // 2
    return linear_segmentation(
        seen.patches[:half], labels.masks[:half], seen.patches[half:], labels.masks[half:]
    )


def read_masks(folder: Path, images: ImageSet, indices: Sequence[int]) -> Tensor:
    """Masks `NAME.png` of images NAME.jpg, cut like them: (n, size, size) int64.

    Args:
        folder: the same tree as the folder of the images.
        images: of a folder.
        indices: of the images.

    Raises:
        InputError: the images are not in a folder, or a mask is missing or not one channel of classes.
    """
    if not images.files:
        raise InputError("--masks: needs --images to be a folder of files, not shards")
    root = Path(images.source)
    return torch.stack([_mask(folder, images.files[i], root, images.size) for i in indices])


def _mask(folder: Path, image: Path, root: Path, size: int) -> Tensor:
    path = folder / image.relative_to(root).with_suffix(".png")
    try:
        with Image.open(path) as mask, Image.open(image) as shown:
            if mask.mode not in ("L", "P", "I;16", "I"):
                raise InputError(f"{path}: holds {mask.mode} pixels; a mask has one channel of class numbers")
            if mask.size != shown.size:
                raise InputError(f"{path}: is {mask.size} px, its image {shown.size}")
            pixels = np.array(_resized(mask, size))
    except OSError as error:
        fault = f"cannot be read as the mask of {image.name} ({first_line(error)})"
        raise InputError(f"{path}: {fault}") from error
    return torch.from_numpy(centre_crop(pixels[..., None], size)[..., 0].astype(np.int64))


def _resized(mask: Image.Image, size: int) -> Image.Image:
    """The shorter side made `size` pixels, as images are."""
    short = min(mask.size)
    if short == size:
        return mask
    target = (int(size * mask.width / short), int(size * mask.height / short))
    return mask.resize(target, Image.Resampling.NEAREST)
