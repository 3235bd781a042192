"""Our own single-file weights.

An export is a safetensors file that also says how to build the model its tensors fit, so it serves alone. The
same description stands beside it as `.json`, for people and scripts; reading never needs it. For other
programs the weights can be a `.pth` file, a plain state dict, which `weights.py` reads.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError, first_line
from pretrain.run.durable import publish
from pretrain.run.safetensors_file import write_safetensors
from pretrain.surgery.architecture import check_section

FORMAT = "pretrain-export-1"
CHECKPOINT_FORMAT = "pretrain-checkpoint-1"  # every tensor of a checkpoint; not a backbone alone
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
    text = description_text(model, about)
    with _written(path, state, {ENTRY: text}) as temporary:
        beside, size = path.with_suffix(".json"), temporary.stat().st_size
        document = {**json.loads(text), "bytes": size}  # of the weights: it belongs to no other file
        note = beside.with_name(beside.name + ".tmp")
        try:
            note.write_text(json.dumps(document, indent=1) + "\n")
            publish(temporary, path)
            publish(note, beside)
        finally:
            note.unlink(missing_ok=True)
    return path


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors in one step: as a .pth file (without the metadata) if so named, else as safetensors.

    Raises:
        InputError: it cannot be written; what was there stays.
    """
    with _written(path, state, metadata) as temporary:
        publish(temporary, path)


@contextmanager
def _written(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Path]:
    """The finished file under a temporary name, which is gone afterwards; failures name the final one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pth":
            torch.save(separate(state), temporary)
        else:
            write_safetensors(temporary, separate(state), {"format": "pt", **metadata})
        yield temporary
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's zip writer: a RuntimeError
        raise InputError(f"{path}: the export cannot be written ({error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def description_text(model: ModelConfig, about: Mapping[str, Any], form: str = FORMAT) -> str:
    """How to build the model: what travels with weights, inside a safetensors file or beside a file."""
    section = asdict(replace(model, init_from=""))
    return json.dumps({"format": form, "model": section, "about": dict(about)}, indent=1)


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
        metadata, state = map_safetensors(path)
        description = parse_description(path, metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {what_it_is(path, error)}") from error
    if description["format"] != FORMAT:
        raise InputError(
            f"{path}: a whole checkpoint; python tools/surgery.py extract teacher FILE --out NEW"
        )
    return Export(state, described_model(path, description.get("model")), dict(description.get("about", {})))


def map_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and mapped tensors of a safetensors file.

    Raises:
        OSError, SafetensorError: it is none, or not complete.
    """
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in names}


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, each with memory of its own.

    safetensors refuses shared memory, and a .pth file would hold the whole memory that a view looks into.
    """
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() > own.numel() * own.element_size()
        separate[name] = own.clone() if shared else own
        seen.add(storage.data_ptr())
    return separate


def parse_description(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `description_text` wrote, from the metadata of a safetensors file.

    Raises:
        InputError: there is none, or it is damaged or of another version.
    """
    if ENTRY not in metadata:
        raise InputError(
            f"{path}: a safetensors file without a description of its model, so not an export of this "
            "project; python tools/surgery.py convert FILE --to ours --out NEW.safetensors makes one"
        )
    try:
        description = json.loads(metadata[ENTRY])
        form, about = description["format"], description.get("about", {})
        known = isinstance(about, dict) and isinstance(about.get("provenance", []), list)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: the description of its model is damaged ({first_line(error)})") from error
    if form not in (FORMAT, CHECKPOINT_FORMAT):
        raise InputError(f"{path}: has the format {form!r}; this version reads {FORMAT!r}")
    if not known:
        raise InputError(f"{path}: the description of its model is damaged (`about` is no object)")
    return cast(dict[str, Any], description)


def described_model(path: Path, section: object) -> ModelConfig:
    """The model section with its keys, types and choices checked; a key it lacks has its default.

    Raises:
        InputError: it does not fit this version.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), cast(dict[str, Any], section))
        model = cast(ModelConfig, OmegaConf.to_object(merged))
        check_section(model)
        return model
    except InputError as error:
        raise InputError(f"{path}: its model section is impossible: {error}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: its model section does not fit this version ({reason})") from error


def what_it_is(path: Path, error: object) -> str:
    """What a file that is no weights looks like, for a line."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"<"):
        return "a web page, not weights: download it again and check the address"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not weights: fetch it with git lfs pull"
    return f"not a complete safetensors file ({error})"
