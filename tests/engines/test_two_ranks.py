"""The original's optimizer steps on two data-parallel ranks, under each engine."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain.config.schema import Config
from pretrain.distributed import rank
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.optim.schedules import Schedules
from pretrain.train import build_engine
from tests.engines.processes import on_ranks
from tests.golden_files import load, relative_error, section
from tests.test_golden import branch_weights, golden_batch, golden_step, key_bias_removed, step_config

NAME = "step_two_ranks"


def golden_config(kind: str, meta: dict, init: dict) -> Config:
    cfg = step_config(meta, init)
    return replace(
        cfg,
        engine=replace(cfg.engine, kind=kind),
        optim=replace(cfg.optim, global_batch_size=2 * meta["settings"]["batch_per_rank"]),
    )


def golden_steps(kinds: list[str]) -> list[dict[str, Any]]:
    return [golden_run(kind) for kind in kinds]


def golden_run(kind: str) -> dict[str, Any]:
    """This rank's losses and gradient norms by step, and the final weights."""
    arrays, meta = load(NAME)
    init, size = section(arrays, "init/"), meta["settings"]["batch_per_rank"]
    cfg = golden_config(kind, meta, init)
    student, teacher, method = SSLBranch(cfg, "student"), SSLBranch(cfg, "teacher"), DinoV2(cfg)
    student.load_state_dict(branch_weights(init, "student"))
    teacher.load_state_dict(branch_weights(init, "teacher"))
    engine = build_engine(cfg, student, teacher, method, torch.device("cpu"))
    schedules, losses, norms = Schedules(cfg), [], []
    for step in range(len(meta["steps"])):
        batch, values = golden_batch(arrays, step, size, rank()), schedules.at(step)
        terms, result = golden_step(engine, method, batch, values, step)
        losses.append({name: float(value) for name, value in terms.parts.items()})
        norms.append({name: float(value) for name, value in result.grad_norms.items()})
    weights = {branch: engine.full_state_dict(branch) for branch in ("student", "teacher")}
    return {"losses": losses, "norms": norms, **weights}


KINDS = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """By engine what each of the two ranks saw."""
    by_rank = on_ranks(2, tmp_path_factory.mktemp("golden"), golden_steps, KINDS)
    return {kind: [found[i] for found in by_rank] for i, kind in enumerate(KINDS)}


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradient_norms(runs: dict[str, list[dict]], kind: str) -> None:
    _, meta = load(NAME)
    koleo_weight = meta["settings"]["dino"]["koleo_loss_weight"]
    for number, found in enumerate(runs[kind]):
        for expected, losses, norms in zip(meta["steps"], found["losses"], found["norms"], strict=True):
            golden = expected["rank_losses"][number]
            assert losses["dino_local"] == pytest.approx(golden["dino_local_crops_loss"], rel=1e-5)
            assert losses["dino_global"] == pytest.approx(golden["dino_global_crops_loss"], rel=1e-5)
            assert losses["ibot"] == pytest.approx(2 * golden["ibot_loss"], rel=1e-5)
            assert koleo_weight * losses["koleo"] / 2 == pytest.approx(golden["koleo_loss"], rel=1e-5)
            assert norms == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_final_weights(runs: dict[str, list[dict]], kind: str, branch: str) -> None:
    arrays, _ = load(NAME)
    weights = runs[kind][0][branch]
    for key, value in branch_weights(section(arrays, "final/"), branch).items():
        error = relative_error(key_bias_removed(key, weights[key]), key_bias_removed(key, value))
        assert error < 1e-4, key
    assert runs[kind][1][branch] == {}  # whole weights are gathered on rank 0
