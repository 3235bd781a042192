import os
import subprocess
from pathlib import Path

import pytest

from pretrain.revision import REVISION, code_revision


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package committed in a git checkout."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-qm", "first")
    return folder


def test_the_revision_of_a_clean_checkout(package: Path) -> None:
    assert code_revision(package) == git(package, "rev-parse", "HEAD")
    (package.parent / "notes.txt").write_text("not code")
    assert code_revision(package) == git(package, "rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["__init__.py", "new.py"])
def test_changed_and_new_code_is_told(package: Path, name: str) -> None:
    (package / name).write_text("x = 1\n")
    assert code_revision(package) == git(package, "rev-parse", "HEAD") + " (modified)"


def test_a_package_installed_inside_another_checkout_has_no_revision(package: Path) -> None:
    installed = package.parent / ".venv" / "lib" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert code_revision(installed) == "not a git checkout"


def test_a_git_hook_does_not_lead_to_another_repository(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    revision = git(package, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert code_revision(package) == revision


def test_no_checkout_and_no_git_are_no_error(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_revision(tmp_path) == "not a git checkout"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_revision(package) == "not a git checkout"


def test_a_copy_tells_what_was_copied(tmp_path: Path) -> None:
    (tmp_path / REVISION).write_text("1234abcd (modified)\n")
    assert code_revision(tmp_path / "package") == "1234abcd (modified)"
