"""Loads weights into the model of the program they are for, to see what it makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.errors import InputError, first_line
from pretrain.export.folders import WEIGHTS
from pretrain.export.model_configs import CONFIG
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
    program = "timm" if "architecture" in json.loads(config.read_text()) else "transformers"
    try:
        load = _timm() if program == "timm" else _transformers()
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        return backbone_features(weights.state, weights.model), f"pretrain ({program}: {first_line(error)})"
    try:
        return load(folder)
    except InputError:
        raise
    except Exception as error:  # a config with wrong values fails in whichever way they lead to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{folder}: {program} does not load it ({reason})") from error


def _transformers() -> Callable[[Path], tuple[Features, str]]:
    import transformers
    from transformers import AutoModel, Dinov2Model, Dinov2WithRegistersModel  # noqa: F401 (can it build them?)

    def load(folder: Path) -> tuple[Features, str]:
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        model, report = AutoModel.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager",  # a config may name code to download
        )
        unfit = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
        if unfit:
            raise InputError(f"{folder}: transformers does not load it whole: {unfit}")
        features = _whole(model, lambda images: model(images).last_hidden_state)
        return features, f"transformers {transformers.__version__}"

    return load


def _timm() -> Callable[[Path], tuple[Features, str]]:
    import timm

    def load(folder: Path) -> tuple[Features, str]:
        config = json.loads((folder / CONFIG).read_text())  # checked when the weights were read
        model: Any = timm.create_model(
            config["architecture"], pretrained=False, **config.get("model_args", {})
        )
        model.load_state_dict(load_file(folder / WEIGHTS[0]), strict=True)
        return _whole(model, model.forward_features), f"timm {timm.__version__}"

    return load


def _whole(model: nn.Module, forward: Features) -> Features:
    model.float().eval()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return forward(images)

    return features
