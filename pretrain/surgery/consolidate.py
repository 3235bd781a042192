"""Sharded checkpoints as whole tensors in one process: ours of any engine, and DeepSpeed's own."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import InputError
from pretrain.run.tensors import read_tensors

# what DeepSpeed writes beside tensors, none of which does anything when it is made
HARMLESS = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
OPTIMIZER = "*_optim_states.pt"


def read_sharded(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a torch.distributed.checkpoint folder whose names begin with `prefix`, whole, by name.

    Raises:
        InputError: a file is missing or damaged, or the metadata wants to run code.
    """
    return {prefix + name: tensor for name, tensor in read_tensors(folder, prefix).items()}


def is_deepspeed(folder: Path) -> bool:
    """Whether DeepSpeed wrote this folder, or one of its tags in it."""
    return bool(list(folder.glob(OPTIMIZER)) or list(folder.glob(f"*/{OPTIMIZER}")))


def read_deepspeed(folder: Path) -> dict[str, Tensor]:
    """The fp32 weights of a ZeRO checkpoint (stages 1 to 3) of any number of ranks, by parameter name.

    Every file is first read by torch's restricted unpickler: DeepSpeed's own merging code, which does the
    rest, would run what a pickle says.

    Raises:
        InputError: a file wants to run code or is damaged, the folder has several tags, or DeepSpeed is not
            installed.
    """
    tag = _tag(folder)
    for path in sorted(tag.glob("*.pt")):
        _check_harmless(path)
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise InputError(
            f"{folder}: reading it needs DeepSpeed; pip install 'pretrain[deepspeed]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = get_fp32_state_dict_from_zero_checkpoint(str(tag.parent), tag=tag.name)
    except Exception as error:  # missing or damaged files fail in whichever way they lead to
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{folder}: DeepSpeed cannot merge it ({type(error).__name__}: {reason})") from error
    return {name: tensor.detach() for name, tensor in state.items()}


def _tag(folder: Path) -> Path:
    if list(folder.glob(OPTIMIZER)):
        return folder
    latest = folder / "latest"
    if latest.is_file():
        return folder / latest.read_text().strip()
    tags = sorted({path.parent for path in folder.glob(f"*/{OPTIMIZER}")})
    if len(tags) != 1:
        raise InputError(f"{folder}: holds {len(tags)} DeepSpeed checkpoints; name one of its folders")
    return tags[0]


def _check_harmless(path: Path) -> None:
    allowed: list[Any] = [(_inert(name), f"{module}.{name}") for module, name in HARMLESS]
    try:
        with torch.serialization.safe_globals(allowed):
            torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"a pickle that wants to run {wanted[1]}" if wanted else (str(error).splitlines() or [""])[0]
        raise InputError(f"{path}: {reason}; refused") from error


def _inert(name: str) -> type:
    """A class that takes anything and does nothing: this reading is a check, its result is dropped."""
    members = {"__init__": _nothing, "__setstate__": _nothing}
    return type(name, (), members)


def _nothing(_self: object, *_arguments: object, **_named: object) -> None:
    pass
