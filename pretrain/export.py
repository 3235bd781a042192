"""Single-file weights: the one place that writes and reads them.

An export is a safetensors file that also says how to build the model its tensors fit, so it serves alone. The
same description stands beside it as `.json`, for people and scripts; reading never needs it. For other
programs the weights can be a `.pth` file, a plain state dict; this project does not read that form.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config.load import load_config
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer
from pretrain.run.checkpoint import read_document
from pretrain.run.checkpoint_folder import require_complete
from pretrain.run.durable import publish, write_text
from pretrain.run.tensors import read_tensors

FORMAT = "pretrain-export-1"
ENTRY = "pretrain"  # our entry in the safetensors metadata


@dataclass(frozen=True)
class Export:
    """What an export holds."""

    state: dict[str, Tensor]  # on the CPU, dtypes as written
    model: ModelConfig  # builds the model that `state` fits
    about: dict[str, Any]  # where it comes from: step, branch, run


def write_export(
    path: Path, state: Mapping[str, Tensor], model: ModelConfig, about: Mapping[str, Any]
) -> Path:
    """Write weights and their description to `path` and `path` with .json; returns `path`.

    Each of the two files is replaced in one step, the weights first. `model.init_from` is written empty: the
    weights come from this file now.

    Raises:
        InputError: `path` does not end in .safetensors or .pth, or cannot be written.
    """
    check_name(path)
    section = asdict(replace(model, init_from=""))
    text = json.dumps({"format": FORMAT, "model": section, "about": dict(about)}, indent=1)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pth":
            torch.save(_separate(state), temporary)
        else:
            save_file(_separate(state), temporary, metadata={"format": "pt", ENTRY: text})
        publish(temporary, path)
        write_text(path.with_suffix(".json"), text + "\n")
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's zip writer: a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: the export cannot be written ({error})") from error
    return path


def export_checkpoint(checkpoint: Path, branch: Literal["student", "teacher"], target: Path) -> Path:
    """Write one branch's backbone from a checkpoint of any engine as an export; returns `target`.

    No process group is needed. The `model` section is that of the config.yaml in the checkpoint's run folder.

    Raises:
        InputError: the checkpoint is not complete or damaged, the config is missing or describes another
            model, or the target cannot be written.
    """
    check_name(target)
    require_complete(checkpoint)
    config = checkpoint.resolve().parents[1] / "config.yaml"
    model, about = load_config(config).model, read_document(checkpoint / "run.json")
    state = read_tensors(checkpoint / "model", f"{branch}.backbone.")
    _check_fit(checkpoint, state, config, model)
    return write_export(target, state, model, {"branch": branch, **about})


def check_name(path: Path) -> None:
    """Refuse a name that no export can have.

    Raises:
        InputError: it ends in neither .safetensors nor .pth.
    """
    if path.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{path}: an export is named *.safetensors or *.pth")


def read_export(path: Path) -> Export:
    """Read an export, tensors on the CPU.

    Raises:
        InputError: the file is missing, damaged or not an export, or its model is unknown to this version.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; an export is a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            description = _description(path, file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        _refuse(path, error)
    return Export(state, _model(path, description.get("model")), dict(description.get("about", {})))


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, each with its own memory: safetensors refuses shared memory."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        own = tensor.detach().cpu().contiguous()
        address = own.untyped_storage().data_ptr()
        separate[name] = own.clone() if address in seen else own
        seen.add(address)
    return separate


def _check_fit(checkpoint: Path, state: Mapping[str, Tensor], config: Path, model: ModelConfig) -> None:
    """Refuse a config whose model has other weights: the export would not say how to build its own."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in VisionTransformer(model).state_dict().items()}
    given = {name: tuple(t.shape) for name, t in state.items()}
    differing = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            f"{config}: its model section is not that of {checkpoint}: {len(differing)} tensors differ, as "
            f"{name} ({wanted.get(name, 'missing')} by the config, {given.get(name, 'missing')} stored); "
            "put the config.yaml of the run that wrote the checkpoint there"
        )


def _description(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if ENTRY not in metadata:
        raise InputError(
            f"{path}: a safetensors file without a description of its model, so not an export of this project"
        )
    try:
        description = json.loads(metadata[ENTRY])
        form = description["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: the description of its model is damaged ({error})") from error
    if form != FORMAT:
        raise InputError(f"{path}: has the format {form!r}; this version reads {FORMAT!r}")
    return cast(dict[str, Any], description)


def _model(path: Path, section: object) -> ModelConfig:
    """The model section with its keys, types and choices checked; a key it lacks has its default."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), cast(dict[str, Any], section))
        return cast(ModelConfig, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: its model section does not fit this version ({reason})") from error


def _refuse(path: Path, error: Exception) -> NoReturn:
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"<"):
        reason = "a web page, not weights: download it again and check the address"
    elif start.startswith(b"version https://git-lfs"):
        reason = "a Git LFS pointer, not weights: fetch it with git lfs pull"
    else:
        reason = f"not a complete safetensors file ({error})"
    raise InputError(f"{path}: {reason}") from error
