"""The tool as a user calls it."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from pretrain.command_line import exit_status

TOOL = Path(__file__).parents[2] / "tools" / "surgery.py"


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
