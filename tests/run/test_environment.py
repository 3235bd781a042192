import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.run import environment
from pretrain.run.environment import code_revision, config_hash, describe


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


def test_describe_names_versions_and_machine_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-value")
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "not-installed-anywhere"))
    text = describe()
    facts = dict(line.split(": ", 1) for line in text.splitlines())
    assert list(facts) == ["code", "python", "platform", "device", "torch"]
    assert facts["python"] == sys.version.split()[0]
    assert facts["torch"] == torch.__version__
    assert "a-secret-value" not in text


def test_every_dependency_of_the_project_is_described() -> None:
    import re
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]
    required = [*project["dependencies"], *extra.get("deepspeed", []), *extra.get("xformers", [])]
    assert {re.split(r"[<>=;\[ ]", text)[0] for text in required} <= set(environment.PACKAGES)


def test_config_hash_is_short_and_stable() -> None:
    assert config_hash("run:\n  steps: 3\n") == config_hash("run:\n  steps: 3\n") != config_hash("run:\n")
    assert config_hash("") == "e3b0c44298fc1c14"
