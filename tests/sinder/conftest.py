"""The tool as a user calls it."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.command_line import exit_status
from tests.sinder.planted import write_images

TOOL = Path(__file__).parents[2] / "tools" / "sinder.py"


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


@pytest.fixture
def sinder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs a verb: status, standard output and standard error."""
    spec = importlib.util.spec_from_file_location("sinder_tool", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sinder.py", *map(str, arguments)])
        status = exit_status("sinder.py", module.main)
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images."""
    return write_images(tmp_path_factory.mktemp("sinder") / "photos", 96)
