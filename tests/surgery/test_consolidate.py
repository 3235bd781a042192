"""Sharded checkpoints of real runs on two ranks, in one process without a process group."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.errors import InputError
from pretrain.export import read_export
from pretrain.surgery.consolidate import read_deepspeed
from tests.engines.layout_runs import STEPS
from tests.golden_files import relative_error
from tests.surgery.backbones import equal
from tests.test_golden import key_bias_removed

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture
def checkpoints(whole: dict[str, Path], zero3: Path) -> dict[str, Path]:
    """The last checkpoint of the same run under several engines."""
    runs = {"single": whole["single"], "fsdp2": whole["fsdp2"], "zero3": zero3}
    return {name: run / "checkpoints" / f"step_{STEPS:08d}" for name, run in runs.items()}


@pytest.fixture
def merged(checkpoints, tmp_path, surgery):
    """Every tensor of each checkpoint."""
    found = {}
    for name, path in checkpoints.items():
        out = tmp_path / f"{name}.safetensors"
        assert surgery("consolidate", path, "--out", out).status == 0
        found[name] = load_file(out)
    return found


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_the_weights_of_two_ranks_are_those_of_one_process(name, merged):
    one, two = merged["single"], merged[name]
    assert one.keys() == two.keys()
    for key in one:
        assert relative_error(key_bias_removed(key, two[key]), key_bias_removed(key, one[key])) < 1e-4, key


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_a_branch_is_the_same_from_the_folder_and_from_the_file(
    branch, checkpoints, merged, tmp_path, surgery
):
    for name, path in checkpoints.items():
        out = tmp_path / f"{name}_{branch}.safetensors"
        assert surgery("extract", branch, path, "--out", out).status == 0
        prefix = f"{branch}.backbone."
        expected = {k.removeprefix(prefix): v for k, v in merged[name].items() if k.startswith(prefix)}
        assert equal(read_export(out).state, expected)


def test_deepspeeds_own_folder_holds_the_students_weights(checkpoints, merged, tmp_path, surgery):
    out = tmp_path / "student.safetensors"
    assert surgery("consolidate", checkpoints["zero3"] / "optim" / "zero", "--out", out).status == 0
    student = {k.removeprefix("student."): v for k, v in merged["zero3"].items() if k.startswith("student.")}
    own = load_file(out)
    assert own.keys() <= student.keys()
    assert equal(own, {key: student[key] for key in own})
    assert {key for key in student if key.startswith("backbone.")} <= own.keys()
    backbone = tmp_path / "backbone.safetensors"
    done = surgery("convert", out, "--to", "ours", "--out", backbone, "--num-heads", 3)
    assert done.status == 0 and "left out" in done.out
    assert "blocks.0.attn.qkv.weight" in read_export(backbone).state


class Harmful:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_file_of_deepspeed_that_wants_to_run_code_is_refused(checkpoints, tmp_path):
    folder = tmp_path / "zero"
    shutil.copytree(checkpoints["zero3"] / "optim" / "zero", folder)
    path = next(folder.glob("*_optim_states.pt"))
    torch.save({"optimizer_state_dict": Harmful(tmp_path / "made")}, path)
    with pytest.raises(InputError, match=r"states\.pt: a pickle that wants to run posix\.mkdir; refused"):
        read_deepspeed(folder)
    assert not (tmp_path / "made").exists()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="PytorchStreamReader"):
        read_deepspeed(folder)
    path.unlink()
    with pytest.raises(InputError, match="DeepSpeed cannot merge it"):
        read_deepspeed(folder)


def test_a_folders_name_leads_to_no_other_files(checkpoints, tmp_path):
    """DeepSpeed takes names for patterns: the neighbour was not looked at."""
    folder, neighbour = tmp_path / "ck[1]", tmp_path / "ck1"
    for place in (folder, neighbour):
        shutil.copytree(checkpoints["zero3"] / "optim" / "zero", place)
    for path in neighbour.glob("*.pt"):
        torch.save({"optimizer_state_dict": Harmful(tmp_path / "made")}, path)
    assert "backbone.cls_token" in read_deepspeed(folder)
    assert not (tmp_path / "made").exists()
    (tmp_path / "run").mkdir()
    shutil.copytree(folder, tmp_path / "run" / "tag")
    (tmp_path / "run" / "latest").write_text("../ck1")
    with pytest.raises(InputError, match=r"latest: names '\.\./ck1', which is no folder beside it"):
        read_deepspeed(tmp_path / "run")
