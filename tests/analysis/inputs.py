"""Small models and images for the tools."""

from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.config.schema import ModelConfig
from pretrain.export import write_export
from pretrain.models.init import init_weights
from pretrain.models.vit import VisionTransformer


def write_model(path: Path, model: ModelConfig, seed: int = 0) -> Path:
    backbone = VisionTransformer(model, "math")
    init_weights(backbone, seed)
    return write_export(path, backbone.state_dict(), model, {})


def scenes(number: int, side: int, seed: int = 0) -> tuple[list[Image.Image], list[Image.Image], list[int]]:
    """Images of a bright square on dark noise, red or green; masks with 0 outside; classes 0 and 1."""
    random = np.random.default_rng(seed)
    images, masks, classes = [], [], []
    for index in range(number):
        pixels = random.integers(0, 60, (side, side, 3), np.uint8)
        top, left = random.integers(side // 8, side // 2, 2)
        place = slice(top, top + side // 3), slice(left, left + side // 3)
        pixels[*place, index % 2] = 230
        mask = np.zeros((side, side), np.uint8)
        mask[place] = 1 + index % 2
        images.append(Image.fromarray(pixels))
        masks.append(Image.fromarray(mask))
        classes.append(index % 2)
    return images, masks, classes
