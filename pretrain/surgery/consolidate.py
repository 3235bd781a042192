"""Sharded checkpoints as whole tensors in one process: ours of any engine, and DeepSpeed's own."""

import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

from torch import Tensor

from pretrain.errors import InputError, first_line
from pretrain.run.deepspeed_files import check_harmless
from pretrain.run.tensors import read_tensors

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
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise InputError(f"{folder}: to read it, pip install 'pretrain[deepspeed]'") from error
    with tempfile.TemporaryDirectory() as place:
        # DeepSpeed finds files by patterns, so a folder's name could lead it to files that were not checked
        links = _linked(_tag(folder), Path(place) / "checkpoint")
        check_harmless(links)
        try:
            with warnings.catch_warnings(), redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                state = get_fp32_state_dict_from_zero_checkpoint(place, tag="checkpoint")
        except Exception as error:  # missing or damaged files fail in whichever way they lead to
            fault = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{folder}: DeepSpeed cannot merge it ({fault})") from error
    return {name: tensor.detach() for name, tensor in state.items()}


def _linked(tag: Path, place: Path) -> list[Path]:
    """Links to a checkpoint's files, in a folder of a plain name."""
    place.mkdir()
    for path in sorted(tag.iterdir()):
        if path.suffix == ".pt":
            (place / path.name).symlink_to(path.resolve())
    return sorted(place.iterdir())


def _tag(folder: Path) -> Path:
    if list(folder.glob(OPTIMIZER)):
        return folder
    latest = folder / "latest"
    if latest.is_file():
        name = latest.read_text(errors="replace").strip()
        if name != Path(name).name or name in ("", ".."):
            raise InputError(f"{latest}: names {name!r}, which is no folder beside it")
        return folder / name
    tags = sorted({path.parent for path in folder.glob(f"*/{OPTIMIZER}")})
    if len(tags) != 1:
        raise InputError(f"{folder}: holds {len(tags)} DeepSpeed checkpoints; name one of its folders")
    return tags[0]
