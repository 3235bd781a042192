"""What several test files read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.data.digits import write_digits
from tests.engines.layout_runs import LAYOUTS, ZERO3, train, write_config

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits as train-*.tar and test-*.tar; not to be changed."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs by layout, each with a checkpoint in the middle; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    for layout in LAYOUTS:
        train([write_config(shards, folder / layout, layout)], folder, layout)
    return {layout: folder / layout for layout in LAYOUTS}


@pytest.fixture(scope="session")
def zero3(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by DeepSpeed's ZeRO 3 on two ranks; not to be changed."""
    folder = tmp_path_factory.mktemp("zero3")
    train([write_config(shards, folder / "two", "ddp2", *ZERO3)], folder, "ddp2")
    return folder / "two"


@pytest.fixture(scope="session")
def other_programs() -> Iterator[None]:
    """transformers and timm can be imported.

    Both import torchvision, whose wheel does not load beside a torch for CPUs until the operators that it
    describes have schemas; nothing here calls them.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            library.define(name + NMS)
    import timm  # noqa: F401
    import transformers

    transformers.utils.logging.disable_progress_bar()
    yield
    del library
