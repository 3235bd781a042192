"""Backbones and whole files from this project's training checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.config.load import save_config
from pretrain.engines.single import SingleEngine
from pretrain.export import read_export
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.models.init import init_weights
from pretrain.run.checkpoint import Checkpoints
from tests.small import small_config
from tests.surgery.backbones import equal

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


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_a_branch_comes_out_with_its_model_and_origin(engine, checkpoint, tmp_path, surgery, branch):
    out = tmp_path / "out" / "a.safetensors"
    done = surgery("extract", branch, checkpoint.parent / "latest", "--out", out)
    assert (done.status, done.err) == (0, "")
    export = read_export(out)
    assert equal(export.state, backbone(engine, branch))
    assert not equal(export.state, backbone(engine, {"teacher": "student", "student": "teacher"}[branch]))
    assert export.model == CFG.model
    provenance = export.about.pop("provenance")
    assert export.about == {"branch": branch, **FACTS}
    assert provenance[0]["arguments"][:2] == ["extract", branch]
    assert len(provenance[0]["sources"][0]["sha256"]) == 64


def test_a_pth_file_is_a_plain_state_dict_with_its_model_beside_it(engine, checkpoint, tmp_path, surgery):
    out = tmp_path / "a.pth"
    assert surgery("extract", "teacher", checkpoint, "--out", out).status == 0
    assert equal(torch.load(out, weights_only=True), backbone(engine, "teacher"))
    assert json.loads((tmp_path / "a.json").read_text())["model"]["embed_dim"] == 24


def test_the_config_of_another_model_is_refused(checkpoint, tmp_path, surgery):
    config, out = checkpoint.parents[1] / "config.yaml", tmp_path / "a.pth"
    save_config(replace(CFG, model=replace(CFG.model, depth=3, num_register_tokens=2)), config)
    done = surgery("extract", "teacher", checkpoint, "--out", out)
    assert done.status == 2 and done.err.count("\n") == 1
    assert f"(the model that {config} describes)" in done.err and "15 missing (register_tokens" in done.err
    config.unlink()
    done = surgery("extract", "teacher", checkpoint, "--out", out)
    assert done.status == 2 and "config.yaml" in done.err
    assert not out.exists()


def test_an_existing_file_is_replaced_only_when_told(checkpoint, tmp_path, surgery):
    out = tmp_path / "a.safetensors"
    assert surgery("extract", "student", checkpoint, "--out", out).status == 0
    refused = surgery("extract", "teacher", checkpoint, "--out", out)
    expected = f"surgery.py: --out {out}: exists; choose another name, or replace it with --force\n"
    assert (refused.status, refused.err) == (2, expected)
    assert read_export(out).about["branch"] == "student"
    assert surgery("extract", "teacher", checkpoint, "--out", out, "--force").status == 0
    assert read_export(out).about["branch"] == "teacher"


def test_a_whole_checkpoint_in_one_file_gives_both_branches_again(engine, checkpoint, tmp_path, surgery):
    whole = tmp_path / "whole.safetensors"
    assert surgery("consolidate", checkpoint, "--out", whole).status == 0
    assert equal(load_file(whole), dict(engine.state_dict()["model"]))
    for branch in ("student", "teacher"):
        out = tmp_path / f"{branch}.safetensors"
        assert surgery("extract", branch, whole, "--out", out).status == 0
        assert equal(read_export(out).state, backbone(engine, branch))
    done = surgery("inspect", whole)
    assert "left out: student.backbone (35 tensors of pretraining)" in done.out


def test_a_run_folder_names_its_newest_checkpoint(checkpoint, tmp_path, surgery):
    for folder in (checkpoint.parents[1], checkpoint.parent):
        done = surgery("inspect", folder)
        assert done.status == 2 and f"name one of them, the newest is {checkpoint}" in done.err
    (checkpoint / "COMPLETE").unlink()
    done = surgery("consolidate", checkpoint, "--out", tmp_path / "a.safetensors")
    assert done.status == 2 and "is not a complete checkpoint" in done.err
