"""Tiny backbones with registers, images, and the tool as a user calls it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.analysis.images import ImageSet
from pretrain.config.schema import ModelConfig
from pretrain.export import write_export
from pretrain.models.vit import VisionTransformer
from pretrain.registers.calibration import Calibration, calibrate
from pretrain.registers.samples import Batch, batches
from tests.scripts import Done, runner
from tests.small import random_backbone, small_model

MODEL = small_model(embed_dim=32, depth=3, num_heads=4, num_register_tokens=4)
PLAIN = replace(MODEL, num_register_tokens=0)


def backbone_of(model: ModelConfig) -> VisionTransformer:
    """Weights under which tokens attend to each other and to what they are about."""
    return random_backbone(model, 0.2)


def write_images(folder: Path, classes: int, each: int) -> Path:
    """A folder of class folders: noise with a colour of its class."""
    stream = np.random.default_rng(0)
    for label in range(classes):
        colour = stream.uniform(60, 200, size=3)
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            coarse = stream.normal(colour, 35, size=(4, 4, 3)).repeat(8, 0).repeat(8, 1)
            pixels = (coarse + stream.normal(0, 15, size=(32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three classes, 20 images each; not to be changed."""
    return write_images(tmp_path_factory.mktemp("registers") / "photos", 3, 20)


@pytest.fixture(scope="session")
def image_set(photos: Path) -> ImageSet:
    return ImageSet(str(photos), 32)


@pytest.fixture(scope="session")
def batch(image_set: ImageSet) -> Batch:
    """Six images, two of each class."""
    return next(batches(image_set, [0, 1, 20, 21, 40, 41], 6))


@pytest.fixture(scope="session")
def backbone() -> VisionTransformer:
    return backbone_of(MODEL)


@pytest.fixture(scope="session")
def calibration(backbone: VisionTransformer, image_set: ImageSet) -> Calibration:
    """Of images that are not in `batch`."""
    rest = batches(image_set, [*range(5, 20), *range(25, 40)], 7)
    return calibrate(backbone, rest, "weights", "preprocessing", 20, 0)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights with and without registers."""
    folder = tmp_path_factory.mktemp("weights")
    models = {"registers": MODEL, "plain": PLAIN}
    return {
        name: write_export(folder / f"{name}.safetensors", backbone_of(model).state_dict(), model, {})
        for name, model in models.items()
    }


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs the tool: status, standard output and standard error."""
    return runner("registers", capsys, monkeypatch)
