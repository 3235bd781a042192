"""Other programs' models, and the tool as a user calls it."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pretrain.command_line import exit_status

TOOL = Path(__file__).parents[2] / "tools" / "surgery.py"
NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


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


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("surgery_tool", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def surgery(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """Runs a verb: status, standard output and standard error."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["surgery.py", *map(str, arguments)])
        status = exit_status("surgery.py", script.main)
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return run
