"""Locks that killed builds leave, and where extensions are compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.engines.deepspeed_environment import BuildLock, extensions_folder, prepare_environment


def test_a_lock_that_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    build = tmp_path / "deepspeed_shm_comm"
    build.mkdir()
    (build / "lock").touch()
    dead = "import os, sys; from pathlib import Path; from pretrain.data.file_lock import FileLock;"
    dead += "assert FileLock(Path(sys.argv[1])).acquire(); os._exit(9)"
    command = [sys.executable, "-c", dead, str(tmp_path / "building")]
    assert subprocess.run(command, check=False, timeout=60).returncode == 9
    assert (tmp_path / "building").exists()
    with BuildLock(tmp_path):
        assert not (build / "lock").exists()
    assert not (tmp_path / "building").exists()


def test_extensions_have_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    prepare_environment(torch.device("cpu"))
    folder = extensions_folder()
    assert folder.parent == tmp_path and folder.is_dir()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(folder)  # also for processes started from here
    assert str(Path(sys.executable).parent) in os.environ["PATH"].split(os.pathsep)
    assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"]) == ("cpu", "0")
    monkeypatch.delenv("LOCAL_RANK")
