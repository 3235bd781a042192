"""The optimizer's state in DeepSpeed's own format: for the same number of ranks, or converted for any.

    optim/zero/        one file a rank, written at every save
    optim/universal/   made from it once by `python tools/universal.py CHECKPOINT`

The converted form is read only where the number of ranks differs. Imports no DeepSpeed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.engines.deepspeed_environment import prepare_environment
from pretrain.errors import InputError, first_line
from pretrain.run.deepspeed_files import check_harmless
from pretrain.run.together import Together

NATIVE, UNIVERSAL = "zero", "universal"


def save_optimizer(engine: Any, folder: Path) -> None:
    """Write DeepSpeed's files below `folder`; a collective call.

    Args:
        engine: DeepSpeed's engine of the student.
        folder: `optim` of a checkpoint; every rank names the same one.
    """
    engine.save_checkpoint(str(folder), tag=NATIVE, save_latest=False)


def load_optimizer(engine: Any, folder: Path, ranks: int) -> bool:
    """Take over what `save_optimizer` wrote; a collective call.

    Args:
        engine: DeepSpeed's engine of the student, which has not saved anything itself.
        folder: `optim` of a checkpoint.
        ranks: in this run.

    Returns:
        False when another engine wrote the checkpoint: nothing was read.

    Raises:
        InputError: it is of another number of ranks and was not converted, cannot be read, or wants to run
            code.
    """
    saved = saved_ranks(folder)
    if not saved:
        return False
    universal = saved != ranks
    if universal and not (folder / UNIVERSAL).is_dir():
        raise InputError(
            f"{folder}: is of {saved} ranks, this run has {ranks}; convert it once with "
            f"python tools/universal.py {folder.parent}"
        )
    tag = UNIVERSAL if universal else NATIVE
    _check_together(folder / tag)
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    _read(engine, folder, tag)
    _repair(optimizer, groups)
    return True


def _read(engine: Any, folder: Path, tag: str) -> None:
    """Let DeepSpeed read one of the two forms; what goes wrong is one line."""
    engine._config.load_universal_checkpoint = tag == UNIVERSAL
    try:
        found, _ = engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    except Exception as error:  # a damaged file, or another stage, fails in whichever way it leads to
        raise InputError(
            f"{folder}: cannot be read ({type(error).__name__}: {first_line(error)}); use the "
            "engine.deepspeed.stage that wrote it, or continue from another checkpoint"
        ) from error
    finally:
        engine._config.load_universal_checkpoint = False
    if found is None:
        raise InputError(f"{folder}: holds no complete optimizer state; continue from another checkpoint")


def _check_together(folder: Path) -> None:
    """Rank 0 looks at the files of all: DeepSpeed unpickles what it is given."""
    together = Together()
    try:
        together.first(lambda: check_harmless(sorted(folder.rglob("*.pt"))))
    finally:
        together.close()


def _repair(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Undo what loading a converted stage 3 does: every group is the first one, and all share one step count.

    The count is a tensor: each group's update would add to it.
    """
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def saved_ranks(folder: Path) -> int:
    """Ranks of the run that wrote the optimizer state below `folder`; 0 where there is none of DeepSpeed."""
    return len(list((folder / NATIVE).glob("*_optim_states.pt")))


def convert(checkpoint: Path) -> Path:
    """Make the optimizer state of a checkpoint readable for any number of ranks; returns its folder.

    Raises:
        InputError: there is nothing to convert, a file wants to run code, or DeepSpeed's converter failed.
    """
    folder = checkpoint / "optim"
    if not saved_ranks(folder):
        raise InputError(f"{checkpoint}: holds no optimizer state of DeepSpeed; name its step_* folder")
    check_harmless(sorted((folder / NATIVE).glob("*.pt")))
    prepare_environment(torch.device("cpu"))
    temporary, final = folder / f"{UNIVERSAL}.tmp", folder / UNIVERSAL
    shutil.rmtree(temporary, ignore_errors=True)
    _run_converter(folder / NATIVE, temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return final


def _run_converter(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        raise InputError(f"{source}: DeepSpeed's converter failed ({last})")
