"""What a run was made with: code revision, packages, machine. No environment variables, so no secrets."""

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pretrain.revision import code_revision

# the direct dependencies, optional ones included, under the names that pip knows
PACKAGES = (
    *("torch", "numpy", "omegaconf", "pyyaml", "webdataset", "braceexpand", "pillow", "simplejpeg"),
    *("opencv-python-headless", "safetensors", "scikit-learn", "scipy", "tensorboard", "rich", "submitit"),
    *("matplotlib", "fsspec", "deepspeed", "xformers"),
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
