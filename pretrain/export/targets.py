"""Writes weights in the formats of other programs, whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export.folders import WEIGHTS
from pretrain.export.model_configs import CONFIG, hugging_face_config, image_processor, timm_config
from pretrain.export.own import ENTRY, check_name, description_text, separate, write_export
from pretrain.run.durable import sync
from pretrain.run.safetensors_file import write_safetensors
from pretrain.surgery.conversion import Target, write_layout
from pretrain.surgery.layouts import DEFAULT_CHUNKS

FOLDERS = ("huggingface", "timm")  # targets that are folders


def check_free(path: Path, target: Target, force: bool) -> None:
    """Refuse a path that exists, or whose name the target cannot have, before any work is done.

    With `force`, a file is replaced, and so is a folder that holds a model and nothing of another kind.

    Raises:
        InputError: it may not be written.
    """
    if target not in FOLDERS:
        check_name(path)
        wanted = ".safetensors" if target == "ours" else ".pth"
        if path.suffix != wanted:
            raise InputError(f"--out {path}: --to {target} writes a {wanted} file; name it so")
    beside = [] if target in FOLDERS else [path.with_suffix(".json")]
    for taken in (path, *beside):
        if (taken.exists() or taken.is_symlink()) and not force:
            raise InputError(f"--out {taken}: exists; choose another name, or replace it with --force")
    for file in (path, *beside) if target not in FOLDERS else ():
        if file.is_dir():
            raise InputError(f"--out {file}: is a folder, a file is to be written; choose another name")
    if path.exists() and target in FOLDERS:
        _check_replaceable(path)


def _check_replaceable(path: Path) -> None:
    ours = {CONFIG, WEIGHTS[0], "preprocessor_config.json"}
    if not path.is_dir():
        raise InputError(f"--out {path}: is a file, a folder is to be written; choose another name")
    if {file.name for file in path.iterdir()} - ours:
        raise InputError(
            f"--out {path}: holds other things than a model; --force replaces model folders only"
        )


def write_weights(
    path: Path,
    target: Target,
    state: Mapping[str, Tensor],
    model: ModelConfig,
    about: Mapping[str, Any],
    chunks: int = DEFAULT_CHUNKS,
    split_swiglu: bool = False,
) -> Path:
    """Write a backbone of ours in a target format; returns `path`.

    Args:
        path: a file, or for `huggingface` and `timm` a folder; replaced if it exists, see `check_free`.
        target: the format.
        state: of the backbone.
        model: of the state.
        about: its origin.
        chunks: of dinov2-chunked.
        split_swiglu: see `write_layout`.

    Raises:
        InputError: it cannot be written.
    """
    named = write_layout(state, model, target, chunks, split_swiglu)
    if target not in FOLDERS:
        return write_export(path, named, model, about)
    return _write_folder(path, named, model, about, _documents(target, model, state))


def _documents(target: Target, model: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    if target == "timm":
        return {CONFIG: timm_config(model)}
    documents = {CONFIG: hugging_face_config(model, str(state["norm.weight"].dtype).removeprefix("torch."))}
    if model.in_channels == 3:  # for others there is no convention
        documents["preprocessor_config.json"] = image_processor(model)
    return documents


def _write_folder(
    path: Path,
    named: Mapping[str, Tensor],
    model: ModelConfig,
    about: Mapping[str, Any],
    documents: Mapping[str, Mapping[str, Any]],
) -> Path:
    path = path.resolve()  # what a link leads to is written, not the link
    work: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        temporary, replaced = work / "new", work / "old"
        temporary.mkdir()
        metadata = {"format": "pt", ENTRY: description_text(model, about)}
        write_safetensors(temporary / WEIGHTS[0], separate(named), metadata)
        for name, document in documents.items():
            (temporary / name).write_text(json.dumps(document, indent=2) + "\n")
        for file in [*temporary.iterdir(), temporary]:
            sync(file)
        _exchange(temporary, path, replaced)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error})") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return path


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Put a folder in the place of another, or leave that one there."""
    if not path.exists():
        new.rename(path)
        return
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
