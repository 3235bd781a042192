"""Exports from a training checkpoint, by the function and by the tool."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.config.load import save_config
from pretrain.engines.single import SingleEngine
from pretrain.errors import InputError
from pretrain.export import export_checkpoint, read_export
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.models.init import init_weights
from pretrain.run.checkpoint import Checkpoints
from tests.small import small_config

ROOT = Path(__file__).parents[1]
CFG = small_config()
FACTS = {"step": 7, "run": "runs/x", "world_size": 1}


@pytest.fixture(scope="module")
def engine() -> SingleEngine:
    student, teacher = SSLBranch(CFG, "student", "math"), SSLBranch(CFG, "teacher", "math")
    init_weights(student, 1)
    init_weights(teacher, 2)
    return SingleEngine(student, teacher, DinoV2(CFG), CFG.optim, CFG.engine, torch.device("cpu"))


@pytest.fixture
def checkpoint(engine: SingleEngine, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    path = Checkpoints(folder / "checkpoints", 3, 0).save(7, engine.state_dict(), {}, FACTS)
    save_config(CFG, folder / "config.yaml")
    return path


def backbone(engine: SingleEngine, branch: str) -> dict[str, torch.Tensor]:
    weights = engine.full_state_dict(branch)
    return {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_a_branch_comes_out_with_its_model_and_origin(engine, checkpoint, tmp_path, branch):
    latest = checkpoint.parent / "latest"
    export = read_export(export_checkpoint(latest, branch, tmp_path / "out" / "a.safetensors"))
    assert same(export.state, backbone(engine, branch))
    assert not same(export.state, backbone(engine, {"teacher": "student", "student": "teacher"}[branch]))
    assert export.model == CFG.model
    assert export.about == {"branch": branch, **FACTS}


def test_a_pth_file_is_a_plain_state_dict_with_its_model_beside_it(engine, checkpoint, tmp_path):
    path = export_checkpoint(checkpoint, "teacher", tmp_path / "a.pth")
    assert same(torch.load(path, weights_only=True), backbone(engine, "teacher"))
    assert json.loads((tmp_path / "a.json").read_text())["model"]["embed_dim"] == 24


def test_the_config_of_another_model_is_refused(checkpoint, tmp_path):
    config = checkpoint.parents[1] / "config.yaml"
    other = replace(CFG, model=replace(CFG.model, depth=3, num_register_tokens=2))
    save_config(other, config)
    with pytest.raises(InputError) as caught:
        export_checkpoint(checkpoint, "teacher", tmp_path / "a.pth")
    assert str(config) in str(caught.value) and "blocks.2" in str(caught.value)
    config.unlink()
    with pytest.raises(InputError, match=r"config\.yaml"):
        export_checkpoint(checkpoint, "teacher", tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "export.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_tool_writes_and_replaces_only_when_told(checkpoint, tmp_path):
    target = tmp_path / "a.safetensors"
    done = tool(checkpoint, target, "--branch", "student")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_export(target).about["branch"] == "student"
    refused = tool(checkpoint, target)
    assert refused.returncode == 2
    assert (
        refused.stderr == f"export.py: {target}: exists; choose another TARGET, or replace it with --force\n"
    )
    assert read_export(target).about["branch"] == "student"
    assert tool(checkpoint, target, "--force").returncode == 0
    assert read_export(target).about["branch"] == "teacher"


def test_wrong_input_is_one_line_and_status_2(checkpoint, tmp_path):
    for arguments, words in [
        ((checkpoint.parent, tmp_path / "a.pth"), "is not a complete checkpoint"),
        ((checkpoint, tmp_path / "a.bin"), "an export is named *.safetensors or *.pth"),
        ((checkpoint,), "command line: the following arguments are required: TARGET"),
    ]:
        done = tool(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert words in done.stderr and done.stderr.count("\n") == 1
