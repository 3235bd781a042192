"""What a run was made with: code revision, packages, machine. No environment variables, so no secrets."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# the direct dependencies, optional ones included, under the names that pip knows
PACKAGES = (
    *("torch", "numpy", "omegaconf", "pyyaml", "webdataset", "braceexpand", "pillow", "simplejpeg"),
    *("opencv-python-headless", "safetensors", "scikit-learn", "tensorboard", "rich", "submitit"),
    *("fsspec", "deepspeed", "xformers"),
)


def describe() -> str:
    """The text of environment.txt, one `name: value` a line; packages that are not installed are left out."""
    facts = {
        "code": code_revision(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _devices(),
        **_versions(),
    }
    return "".join(f"{name}: {value}\n" for name, value in facts.items())


def config_hash(text: str) -> str:
    """16 hexadecimal digits that name a config's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_revision(package: Path) -> str:
    """The git revision of the code in a folder, `(modified)` when its files differ from it.

    A package installed inside another checkout (in a virtual environment, say) is not of that revision, so
    only a folder whose `__init__.py` git tracks counts.
    """
    revision = _git(package, "rev-parse", "HEAD")
    if revision is None or _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return "not a git checkout"
    changes = _git(package, "status", "--porcelain", "--", ".")
    return f"{revision} (modified)" if changes else revision


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None when there is no git, no checkout, or it fails."""
    # inside a git hook GIT_DIR and its kind would point git at another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _devices() -> str:
    if not torch.cuda.is_available():
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{names} (CUDA {torch.version.cuda})"
