"""The generated page is current, and the commands that the documents show are accepted."""

import re
import shlex
from pathlib import Path

import pytest

from pretrain.config.docs import configuration_page
from pretrain.config.load import load_config

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?python -m pretrain (configs/\S+.*)$", re.MULTILINE)


def shown_commands(page: Path) -> list[str]:
    """The training commands in a page's code blocks, continued lines joined and comments removed."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [command for block in blocks for command in COMMAND.findall(block.replace("\\\n", " "))]


def test_the_configuration_page_is_current() -> None:
    message = "docs/configuration.md is not what the schema says: run `make docs`"
    assert (ROOT / "docs/configuration.md").read_text() == configuration_page(), message


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
)
def test_shown_commands_are_accepted(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in shown_commands(ROOT / page):
        name, *overrides = shlex.split(command, comments=True)
        load_config(name, [text for text in overrides if text not in ("--print-config", "--dry-run")])


def test_the_readme_shows_a_training_command() -> None:
    assert shown_commands(ROOT / "README.md")
