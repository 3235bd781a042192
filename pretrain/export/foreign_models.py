"""Loads weights into the model of the program they are for, to see what it makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.errors import InputError
from pretrain.export.folders import CONFIG, WEIGHTS
from pretrain.export.weights import Weights
from pretrain.surgery.compare import backbone_features

Features = Callable[[Tensor], Tensor]  # images (B, C, S, S') to all normed tokens (B, 1 + R + N, D)


def features_of(weights: Weights) -> tuple[Features, str]:
    """The function that weights compute, by the program they are for, and that program's name and version.

    A model folder is loaded by transformers or timm; everything else, and a folder whose program cannot be
    imported, by this project, which the name then says.

    Raises:
        InputError: the program refuses the weights.
    """
    folder = weights.path if weights.path.is_dir() else weights.path.parent
    config = folder / CONFIG
    is_model = (weights.path.is_dir() or weights.path.name in WEIGHTS) and config.is_file()
    if not is_model:
        return backbone_features(weights.state, weights.model), "pretrain"
    load, program = (
        (_timm, "timm")
        if "architecture" in json.loads(config.read_text())
        else (_transformers, "transformers")
    )
    try:
        return load(folder)
    except ImportError as error:
        reason = (str(error).splitlines() or [""])[0]
        return backbone_features(weights.state, weights.model), f"pretrain ({program}: {reason})"


def _transformers(folder: Path) -> tuple[Features, str]:
    import transformers

    try:
        model, report = transformers.AutoModel.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: transformers does not load it ({_first_line(error)})") from error
    unfit = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if unfit:
        raise InputError(f"{folder}: transformers does not load it whole: {unfit}")
    return _whole(
        model, lambda images: model(images).last_hidden_state
    ), f"transformers {transformers.__version__}"


def _timm(folder: Path) -> tuple[Features, str]:
    try:
        import timm
    except RuntimeError as error:  # a torchvision that does not fit torch
        raise ImportError(str(error)) from error
    config = json.loads((folder / CONFIG).read_text())
    try:
        model: Any = timm.create_model(
            config["architecture"], pretrained=False, **config.get("model_args", {})
        )
        model.load_state_dict(load_file(folder / WEIGHTS[0]), strict=True)
    except (KeyError, OSError, RuntimeError, TypeError) as error:
        raise InputError(f"{folder}: timm does not load it ({_first_line(error)})") from error
    return _whole(model, model.forward_features), f"timm {timm.__version__}"


def _whole(model: nn.Module, forward: Features) -> Features:
    model.float().eval()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return forward(images)

    return features


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
