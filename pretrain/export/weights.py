"""Backbones from files of any format, in our form."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export.files import TORCH_FILE, Contents
from pretrain.export.folders import open_weights
from pretrain.export.model_configs import settings_of
from pretrain.export.own import described_model
from pretrain.surgery.architecture import Settings
from pretrain.surgery.conversion import Change, Form, read_backbone
from pretrain.surgery.inspection import first_not_finite
from pretrain.surgery.progress import Stage, silent, size

SHARDED_BACKBONE = "{}.backbone."  # of a branch in this project's checkpoints


@dataclass(frozen=True)
class Weights:
    """A backbone and where it was found."""

    path: Path
    kind: str  # of the file, in words
    layout: str  # of the names, in words
    form: Form  # in which to write them again
    state: dict[str, Tensor]
    model: ModelConfig
    about: dict[str, Any]  # origin, as far as the file says
    changes: tuple[Change, ...]  # against the file
    described: bool  # by our own description, so that no setting is by convention


def read_weights(
    path: Path,
    branch: str | None = None,
    settings: Settings | None = None,
    finite: bool = True,
    stage: Stage = silent,
) -> Weights:
    """The backbone in a file or folder of any known format.

    Args:
        path: an export, a released .pth, a checkpoint of any engine, a model folder of Hugging Face or timm.
        branch: `student` or `teacher` where there are both; None = the teacher's.
        settings: what the file does not tell; wins over what it does.
        finite: refuse NaN and Inf, which takes one look at every value.
        stage: tells how far that is.

    Raises:
        InputError: the file cannot be read, or holds no whole backbone of a known kind.
    """
    contents = open_weights(path, SHARDED_BACKBONE.format(branch or "teacher") if _is_own(path) else "")
    described, about = contents.description.get("model"), dict(contents.description.get("about", {}))
    if branch and about.get("branch") == branch:
        branch = None  # the file says whose it is, its names need not
    model = described_model(path, described) if described is not None else None
    try:
        found = read_backbone(contents.tensors, branch, _settings(contents, settings), model)
        advance = stage(f"checking {path.name}", size(found.state))
        broken = first_not_finite(found.state, advance) if finite else None
        if broken:
            raise InputError(f"{broken} holds NaN or Inf; `inspect` lists all such values")
    except InputError as error:
        hint = f" (the model that {contents.described_by} describes)" if model else ""
        raise InputError(f"{path}: {error}{hint}") from error
    if branch or _is_own(path):
        about = {**about, "branch": branch or "teacher"}
    return Weights(
        path,
        contents.kind,
        found.layout,
        _form(contents, found.form),
        found.state,
        found.model,
        about,
        found.changes,
        model is not None,
    )


def _form(contents: Contents, found: Form) -> Form:
    """DINOv2's names with our description, or in one of our checkpoints, are our own format."""
    ours = found.target == "dinov2" and bool(contents.description) and contents.kind != TORCH_FILE
    return Form("ours") if ours else found


def _is_own(path: Path) -> bool:
    return (path / "model" / ".metadata").is_file()


def _settings(contents: Contents, given: Settings | None) -> Settings:
    """What the user says, then what a config.json says; our own description is more exact than that."""
    said_by_config = settings_of(contents.config)  # looked at in any case: it may say something impossible
    found = Settings() if "model" in contents.description else said_by_config
    if given is None:
        return found
    said = {name: value for name, value in vars(given).items() if value is not None}
    return replace(found, **said)
