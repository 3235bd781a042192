"""Whether DeepSpeed's files hold nothing but what it writes: DeepSpeed itself runs what a pickle says."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import InputError, first_line
from pretrain.run.refused_pickle import wanted_global

# what DeepSpeed writes beside tensors, none of which does anything when it is made
HARMLESS = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


def check_harmless(paths: Iterable[Path]) -> None:
    """Read files by torch's restricted unpickler, values of tensors excepted; needs no DeepSpeed.

    Raises:
        InputError: one wants to run code, or is damaged; names it.
    """
    allowed: list[Any] = [(_inert(name), f"{module}.{name}") for module, name in HARMLESS]
    with torch.serialization.safe_globals(allowed):
        for path in paths:
            _check(path)


def _check(path: Path) -> None:
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        wanted = wanted_global(error)
        reason = f"a pickle that wants to run {wanted}" if wanted else first_line(error)
        raise InputError(f"{path.resolve()}: {reason}; refused") from error


def _inert(name: str) -> type:
    """A class that takes anything and does nothing: this reading is a check, its result is dropped."""
    members = {"__init__": _nothing, "__setstate__": _nothing}
    return type(name, (), members)


def _nothing(_self: object, *_arguments: object, **_named: object) -> None:
    pass
