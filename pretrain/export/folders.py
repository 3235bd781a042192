"""Opens folders of weights: our checkpoints, those of DCP and DeepSpeed, models of Hugging Face and timm."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.config.load import load_config
from pretrain.errors import InputError
from pretrain.export.files import Contents, open_file
from pretrain.export.model_configs import CONFIG
from pretrain.export.own import FORMAT, description_text
from pretrain.run.checkpoint import read_document
from pretrain.run.checkpoint_folder import newest_checkpoint, require_complete
from pretrain.surgery.consolidate import is_deepspeed, read_deepspeed, read_sharded

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)  # the first that is there


def open_weights(path: Path, prefix: str = "") -> Contents:
    """What a file or folder of weights holds.

    Args:
        path: a file, or a folder of any known kind.
        prefix: of a sharded checkpoint, read only the tensors whose names begin so.

    Raises:
        InputError: it is missing, damaged or incomplete, wants to run code, or is of no known kind.
    """
    if path.is_dir():
        return _open_folder(path, prefix)
    contents = open_file(path)
    config = path.parent / CONFIG
    if path.name in WEIGHTS and config.is_file():
        return replace(contents, config=_config(config))
    return contents


def _open_folder(path: Path, prefix: str) -> Contents:
    if (path / "model" / ".metadata").is_file():
        return _own_checkpoint(path, prefix)
    if (path / ".metadata").is_file():
        return Contents("sharded checkpoint", read_sharded(path, prefix))
    if is_deepspeed(path):
        return Contents("DeepSpeed ZeRO checkpoint", read_deepspeed(path))
    if (path / CONFIG).is_file():
        return _model_folder(path)
    newest = newest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if newest is not None:
        raise InputError(f"{path}: a folder of checkpoints; name one of them, the newest is {newest}")
    raise InputError(
        f"{path}: a folder that holds no weights: neither a checkpoint nor a {CONFIG} with {WEIGHTS[0]}"
    )


def _own_checkpoint(path: Path, prefix: str) -> Contents:
    """With the model section of the run's config.yaml, and what run.json says of the origin."""
    require_complete(path)
    config = path.resolve().parent.parent / "config.yaml"  # `parents[1]` fails right below the root
    facts = read_document(path / "run.json")
    description = json.loads(description_text(load_config(config).model, facts))
    tensors = read_sharded(path / "model", prefix)
    return Contents("sharded checkpoint of this project", tensors, description, str(config))


def _model_folder(path: Path) -> Contents:
    for name in WEIGHTS:
        if (path / name).is_file():
            contents = _indexed(path / name) if name.endswith(".index.json") else open_file(path / name)
            return replace(contents, kind="model folder", config=_config(path / CONFIG))
    raise InputError(f"{path}: has a {CONFIG} and no weights ({', '.join(WEIGHTS)})")


def _indexed(index: Path) -> Contents:
    """Hugging Face's weights in several files."""
    files = _config(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{index}: its weight_map does not give a file for each tensor")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise InputError(f"{index}: names the file {name!r} outside of its folder")
        tensors |= open_file(index.parent / name).tensors
    missing = sorted(set(files) - set(tensors))
    if missing:
        raise InputError(f"{index}: lists {len(missing)} tensors that no file holds, as {missing[0]}")
    return Contents("several files", tensors)


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: is not a JSON object")
    return found if found.get("format") != FORMAT else {}  # the note beside an export named `config`
