"""The package builds as pip builds it, and the files that say what it needs agree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its build folder beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "pretrain", source / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*pip, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("pretrain-*.whl")
    return path


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pretrain").rglob("*.py")}
    assert modules | {"pretrain/py.typed"} == {name for name in names if name.startswith("pretrain/")}
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"pretrain"}


def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Recipes and tools stay in the checkout; a config of one's own is all that a run needs."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "mine.yaml").write_text("run: {dir: runs/mine}\noptim: {lr: 0.003}\n")
    found = "import sys, pretrain; print(pretrain.__file__)"
    shown = f"{found}; from pretrain.cli import main; sys.exit(main(['mine.yaml', '--print-config']))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}  # before the checkout that is installed
    command = [sys.executable, "-c", shown]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path)) and "lr: 0.003" in done.stdout


def requirement(line: str) -> str:
    """The name of a requirement, as packages are compared."""
    found = re.match(r"[\w.-]+", line)
    assert found, line
    return found[0].lower().replace("_", "-")


def test_the_conda_environment_installs_what_the_package_names() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *programs, pip = environment["dependencies"]
    [python] = [line for line in programs if line.startswith("python=")]
    version = tuple(int(part) for part in python.removeprefix("python=").split("."))
    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert least and version >= (int(least[1]), int(least[2]))
    constraint, editable = pip["pip"]
    assert (ROOT / constraint.removeprefix("--constraint ")).exists()
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", editable)
    assert extras and set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    assert environment["name"] == PROJECT["name"]


def test_every_package_of_every_extra_is_pinned() -> None:
    pins = {requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = PROJECT["optional-dependencies"].values()
    named = {
        requirement(line) for line in [*PROJECT["dependencies"], *(x for extra in extras for x in extra)]
    }
    assert named <= pins


def test_every_extra_is_in_dev_or_in_the_conda_environment() -> None:
    """What no environment of ours installs would be tried by nobody."""
    optional = PROJECT["optional-dependencies"]
    conda = (ROOT / "environment.yml").read_text()
    dev = {requirement(line) for line in optional["dev"]}
    for name, lines in optional.items():
        covered = {requirement(line) for line in lines} <= dev
        assert covered or re.search(rf"\[[\w,]*\b{name}\b", conda), name


def test_the_python_version_is_one_everywhere() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    least = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python >= {least}" in (ROOT / "README.md").read_text()
    assert f"Python >= {least}" in (ROOT / "Makefile").read_text()
    target = pyproject["tool"]["ruff"].get("target-version", f"py{least.replace('.', '')}")
    assert target == f"py{least.replace('.', '')}"
