"""The tool as a user calls it."""

from collections.abc import Callable

import pytest

from tests.scripts import Done, runner


@pytest.fixture
def surgery(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs a verb: status, standard output and standard error."""
    return runner("surgery", capsys, monkeypatch)
