"""Backbones as other programs write them, and small ones for refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pretrain.config.schema import ModelConfig
from pretrain.export import write_export
from pretrain.export.transform import Order, convert
from tests.surgery.backbones import PLAIN, random_state

TINY = replace(PLAIN, embed_dim=64, num_heads=1)
STATE = random_state(TINY)
Maker = Callable[[Path], Path]


def without_description(path: Path) -> Path:
    """As other programs write it."""
    weights = path / "model.safetensors"
    if path.is_dir():
        save_file(load_file(weights), weights, metadata={"format": "pt"})
    elif path.suffix == ".pth":
        path.with_suffix(".json").unlink()
    return path


def written_as(folder: Path, target: str, state: dict[str, torch.Tensor], model: ModelConfig) -> Path:
    ours = write_export(folder / "ours.safetensors", state, model, {})
    if target == "ours":
        return ours
    path = folder / (f"{target}.pth" if target.startswith("dinov2") else target)
    convert(ours, target, Order(path, allow_loss=True))
    return without_description(path)


def of(model: ModelConfig, target: str = "dinov2") -> Maker:
    return lambda folder: written_as(folder, target, random_state(model), model)
