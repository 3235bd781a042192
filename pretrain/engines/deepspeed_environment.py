"""What must be right before DeepSpeed is imported, so that no user meets its traps.

On CPUs DeepSpeed compiles its communication (`deepspeed_shm_comm`, about a minute) at the first start. A
process that is killed meanwhile leaves a file `lock`, for which every later run would wait without an end. So
builds go to a folder of our own, one process at a time behind a lock that notices dead owners; whoever holds
that may remove the other.
"""

import importlib.metadata
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from pretrain.data.file_lock import FileLock
from pretrain.errors import InputError

BUILD_SECONDS = 1_200  # waiting for another process that compiles


def prepare_environment(device: torch.device) -> None:
    """Settle what DeepSpeed reads when it is imported: the accelerator, where it compiles, and ninja's place.

    Raises:
        InputError: the folder of compiled extensions cannot be made.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    local = torch.cuda.current_device() if device.type == "cuda" else 0
    os.environ.setdefault("LOCAL_RANK", str(local))  # demanded; not set where Slurm starts the ranks
    if shutil.which("ninja") is None:  # installed beside this Python, which need not be on PATH
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    folder = extensions_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made for compiled extensions ({error}); set TORCH_EXTENSIONS_DIR"
        ) from error
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)


def extensions_folder() -> Path:
    """Compiled extensions of this machine and these versions, below TORCH_EXTENSIONS_DIR where it is set."""
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    name = f"pretrain-{os.uname().nodename}-torch{torch.__version__}-deepspeed{version}"
    parent = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    return parent if parent.name == name else parent / name


class BuildLock:
    """Held by the one process of this machine that compiles; locks that killed builds left are removed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, FileLock(folder / "building")

    def __enter__(self) -> None:
        """Wait for other processes.

        Raises:
            InputError: another process has been compiling for too long.
        """
        end = time.monotonic() + BUILD_SECONDS
        while not self.lock.acquire():
            if time.monotonic() > end:
                raise InputError(
                    f"{self.folder}: another process has been compiling there for {BUILD_SECONDS} s; "
                    "end it and remove the folder"
                )
            time.sleep(0.2)
        for stale in self.folder.glob("*/lock"):
            stale.unlink(missing_ok=True)

    def __exit__(self, *exc: object) -> None:
        """Let the next one in."""
        self.lock.release()
