"""Reads the reference numbers of tests/golden."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays (float16 as float32) and settings of one file."""
    with np.load(FOLDER / f"{name}.npz") as data:
        arrays = {key: torch.from_numpy(data[key]) for key in data.files if key != "meta_json"}
        settings = json.loads(bytes(data["meta_json"]).decode())
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in arrays.items()}, settings


def section(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays below a prefix, block chunks flattened: blocks.1.5.x becomes blocks.5.x."""
    flat = {}
    for key, value in arrays.items():
        if key.startswith(prefix):
            flat[re.sub(r"blocks\.\d+\.(\d+)\.", r"blocks.\1.", key.removeprefix(prefix))] = value
    return flat


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
