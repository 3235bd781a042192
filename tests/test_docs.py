"""The generated page is current; commands, links, keys and make targets that the documents show exist."""

import argparse
import functools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from pretrain.config.docs import configuration_page
from pretrain.config.keys import settings
from pretrain.config.load import load_config
from pretrain.config.schema import Config
from tests.scripts import load

ROOT = Path(__file__).parents[1]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "tools/README.md", *DOCS]
SURGERY = re.compile(r"python tools/surgery\.py ([^`\n]*)")
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?python -m pretrain (configs/\S+.*)$", re.MULTILINE)
SCRIPT = re.compile(r"\bpython ((?:tools|launchers|benchmarks)/\w+\.py)([^`\n]*)")
MAKE = re.compile(r"^(?:\$ |    )?make ([\w-]+)|`make ([\w-]+)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SECTIONS = "|".join(field.name for field in fields(Config))
KEY = re.compile(rf"((?:{SECTIONS})(?:\.\w+)+)(?:=.*)?")
FILES = (".json", ".lock", ".py", ".yaml", ".safetensors")  # data.json is no setting
SHELL = ("|", "||", "&&", ">", ">>", "&", ";", "2>&1")  # after these a command's own arguments end


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: Path) -> list[str]:
    """A page's code blocks, continued lines joined."""
    found = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def prose(page: str) -> str:
    """A page without its code blocks, fenced or indented."""
    fenced = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", fenced, flags=re.MULTILINE)


def shown_commands(page: Path) -> list[str]:
    """The training commands in a page's code blocks."""
    return [command for block in blocks(page) for command in COMMAND.findall(block)]


def words_of(command: str) -> list[str]:
    """A command's own words: no comment, no redirection."""
    words = shlex.split(command, comments=True)
    return words[: next((i for i, word in enumerate(words) if word in SHELL), len(words))]


def test_the_configuration_page_is_current() -> None:
    message = "docs/configuration.md is not what the schema says: run `make docs`"
    assert (ROOT / "docs/configuration.md").read_text() == configuration_page(), message


@pytest.mark.parametrize("page", PAGES)
def test_shown_commands_are_accepted(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in shown_commands(ROOT / page):
        name, *overrides = words_of(command)
        load_config(name, [text for text in overrides if text not in ("--print-config", "--dry-run")])


def test_the_readme_shows_a_training_command() -> None:
    assert shown_commands(ROOT / "README.md")


def test_shown_surgery_is_accepted_and_every_verb_is_shown() -> None:
    script = load("surgery")
    for page in PAGES:
        commands = [words_of(command) for command in SURGERY.findall(text_of(page))]
        verbs = {script.parse(command).run.__name__ for command in commands}
        if page in ("docs/surgery.md", "tools/README.md"):
            assert verbs == {name for name in vars(script) if name.startswith("run_")}


class Parsed(BaseException):
    """The command line was accepted: the script goes no further."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    """Start a script as python does, up to where its command line is read."""

    def stopped(method):
        @functools.wraps(method)
        def read(*arguments):
            raise Parsed(method(*arguments))

        return read

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopped(getattr(argparse.ArgumentParser, name)))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # its scripts import one another
    monkeypatch.chdir(ROOT)

    def start(script: str, words: Sequence[str]) -> None:
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed):
            runpy.run_path(script, run_name="__main__")

    return start


@pytest.mark.parametrize("page", [page for page in PAGES if SCRIPT.search(text_of(page))])
def test_shown_scripts_accept_their_arguments(page: str, parse) -> None:
    for script, rest in SCRIPT.findall(text_of(page).replace("\\\n", " ")):
        words = words_of(rest)
        try:
            parse(script, words)
        except SystemExit as error:
            pytest.fail(f"{page}: python {script}{rest}: status {error.code}")
        config = [word for word in words if re.fullmatch(r"configs/\S+\.yaml", word)]
        if config and script != "tools/pack.py":
            load_config(config[0], [word for word in words if KEY.fullmatch(word)])


def test_an_unknown_option_would_be_seen(parse, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("tools/pack.py", ["photos/", "data/mine", "--no-such-option"])
    assert "--no-such-option" in capsys.readouterr().err


def test_shown_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        shown = {first or second for first, second in MAKE.findall(text_of(page))}
        assert shown <= targets, page


# -- links and keys


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def broken_links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):  # another site
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert list(broken_links(ROOT / page)) == []


def test_a_broken_link_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `thing`: more\n[a](#one-thing-more) [b](#two) [c](gone.md) [d](https://x.org/y)\n")
    assert list(broken_links(page)) == ["#two", "gone.md"]


def unknown_keys(text: str) -> list[str]:
    """Names in code quotes that look like settings and are none; a section, or one with a star, is known."""
    known = {key.rsplit(".", i)[0] for key in settings(Config()) for i in range(key.count(".") + 1)}
    quoted = [word.strip(",;:") for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    keys = [match[1] for word in quoted if (match := KEY.fullmatch(word)) and not word.endswith(FILES)]
    free = ("engine.deepspeed.extra.", "teacher.backbone", "teacher.dino_head")  # and tensors
    return [key for key in keys if key not in known and not key.startswith(free)]


@pytest.mark.parametrize("page", PAGES)
def test_named_settings_exist(page: str) -> None:
    assert unknown_keys(prose(page)) == []


def test_an_unknown_setting_would_be_seen() -> None:
    text = "`optim.lr=0.1 optim.rate=2`, `run.json`, `log.knn`, `data.shard`"
    assert unknown_keys(text) == ["optim.rate", "data.shard"]
