"""The generated page is current, and the commands that the documents show are accepted."""

import re
import shlex
from pathlib import Path

import pytest

from pretrain.config.docs import configuration_page
from pretrain.config.load import load_config
from tests.scripts import load

ROOT = Path(__file__).parents[1]
SURGERY = re.compile(r"python tools/surgery\.py ([^`\n]*)")
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?python -m pretrain (configs/\S+.*)$", re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """A page's code blocks, continued lines joined."""
    found = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def shown_commands(page: Path) -> list[str]:
    """The training commands in a page's code blocks."""
    return [command for block in blocks(page) for command in COMMAND.findall(block)]


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


def test_shown_surgery_is_accepted_and_every_verb_is_shown() -> None:
    script = load("surgery")
    pages = [ROOT / "README.md", ROOT / "tools" / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        commands = [shlex.split(text, comments=True) for text in SURGERY.findall(page.read_text())]
        verbs = {script.parse(command).run.__name__ for command in commands}
        if page.name == "surgery.md" or page.parent.name == "tools":
            assert verbs == {name for name in vars(script) if name.startswith("run_")}
