"""What a comparison of models is told about its images: classes of shards, and masks beside the images."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pretrain.analysis.features import knn_scores
from pretrain.analysis.images import RGB
from pretrain.analysis.scaling import Scaling
from pretrain.analysis.segmentation import SegmentationScores, linear_segmentation
from pretrain.config.schema import KnnConfig
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.look import Look

KNN_CROP, KNN_RESIZE = 224, 256  # pixels, as DINOv2 evaluates; the crop is cut to whole patches


@dataclass(frozen=True)
class Labels:
    """What there is; empty where nothing was given."""

    knn_train: Sequence[str] = ()  # shards with classes
    knn_test: Sequence[str] = ()
    masks: Tensor | None = None  # (n, S, S) classes of the pixels of the compared images
    scaling: Scaling = RGB  # of the images of the shards


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
        labels.scaling.labelled(shards, f"--knn-{name}", max(KNN_RESIZE, crop), crop, batch_size)
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
