"""The tool as a user calls it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts import Done, runner
from tests.sinder.planted import write_images


@pytest.fixture
def sinder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs a verb: status, standard output and standard error."""
    return runner("sinder", capsys, monkeypatch)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images."""
    return write_images(tmp_path_factory.mktemp("sinder") / "photos", 96)
