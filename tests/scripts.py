"""The scripts of tools/ as a user calls them."""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from pretrain.command_line import exit_status

TOOLS = Path(__file__).parents[1] / "tools"


class Done(NamedTuple):
    """What a call ended with."""

    status: int
    out: str
    err: str


@cache
def load(name: str) -> ModuleType:
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runner(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """Runs a tool: status, standard output and standard error."""
    module = load(name)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        status = exit_status(f"{name}.py", module.main)
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return run
