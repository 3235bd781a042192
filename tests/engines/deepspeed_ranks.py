"""One rank of the DeepSpeed tests: several checks in one start.

    python -m tests.engines.deepspeed_ranks train STAGE FOLDER
    python -m tests.engines.deepspeed_ranks resume STAGE FOLDER

with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. `resume` continues what `train` saved.
"""

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.config.schema import DeepspeedConfig, EngineConfig
from pretrain.engines.deepspeed_start import build_deepspeed
from pretrain.method.branch import SSLBranch
from pretrain.method.dinov2 import DinoV2
from pretrain.optim.schedules import Schedules
from tests.engines.deepspeed_small import (
    BAD_STEP,
    CPU,
    STEPS,
    build,
    is_first,
    on_deepspeed,
    plain_config,
    rmlp_config,
    run,
)
from tests.golden_files import load, relative_error, section
from tests.small import random_batch
from tests.test_golden import branch_weights, golden_batch, golden_step, key_bias_removed, step_config

MORE = range(STEPS, STEPS + 2)  # steps after a resume


def golden(stage):
    """Largest relative errors of losses, gradient norms and final weights."""
    arrays, meta = load("step_two_ranks")
    init, final = section(arrays, "init/"), section(arrays, "final/")
    size, rank = meta["settings"]["batch_per_rank"], dist.get_rank()
    cfg = step_config(meta, init)
    engine = EngineConfig("deepspeed", "cpu", "fp32", deepspeed=DeepspeedConfig(stage))
    cfg = replace(cfg, engine=engine, optim=replace(cfg.optim, global_batch_size=2 * size))
    student, teacher, method = SSLBranch(cfg, "student"), SSLBranch(cfg, "teacher"), DinoV2(cfg)
    student.load_state_dict(branch_weights(init, "student"))
    teacher.load_state_dict(branch_weights(init, "teacher"))
    engine = build_deepspeed(student, teacher, method, cfg.optim, cfg.engine, CPU)

    errors = {"losses": 0.0, "norms": 0.0, "weights": 0.0}
    for step, expected in enumerate(meta["steps"]):
        batch, values = golden_batch(arrays, step, size, rank), Schedules(cfg).at(step)
        terms, result = golden_step(engine, method, batch, values, step)
        for key, value in logged(expected["rank_losses"][rank], cfg).items():
            errors["losses"] = max(errors["losses"], abs(terms.parts[key].item() / value - 1))
        for key, value in expected["grad_norm"].items():
            errors["norms"] = max(errors["norms"], abs(result.grad_norms[key].item() / value - 1))
    for branch in ("student", "teacher"):
        weights = engine.full_state_dict(branch)
        for key, value in branch_weights(final, branch).items():
            error = relative_error(key_bias_removed(key, weights[key]), key_bias_removed(key, value))
            errors["weights"] = max(errors["weights"], error)
    return errors


def logged(losses, cfg):
    """Our loss terms from what the original logs."""
    return {
        "dino_local": losses["dino_local_crops_loss"],
        "dino_global": losses["dino_global_crops_loss"],
        "ibot": 2 * losses["ibot_loss"],
        "koleo": 2 * losses["koleo_loss"] / cfg.loss.koleo_weight,
    }


def teacher_errors(cfg, engine):
    """How far forwards of the wrapped teacher are from those of a plain one with its gathered weights."""
    plain = SSLBranch(cfg, "teacher").eval()
    plain.load_state_dict(engine.full_state_dict("teacher"))
    plain.begin_step(cfg.run.steps)
    engine.branches["teacher"].begin_step(cfg.run.steps)
    batch = random_batch(cfg, 4, seed=99)
    images = batch.global_crops
    with torch.no_grad():
        expected, features = plain(batch), plain.backbone([images])[0]
    out, seen = engine.teacher(batch), engine.features(images)
    pairs = [
        (out.cls, expected["cls"]),
        (out.dino.features, expected["dino_features"]),
        (out.ibot.prototypes, expected["ibot_prototypes"]),
        (seen.cls, features.cls),
        (seen.patches, features.patches),
    ]
    return max(relative_error(actual, wanted) for actual, wanted in pairs)


def train(stage, folder):
    cfg = on_deepspeed(plain_config(), stage)
    plain, built = run(cfg, bad=BAD_STEP)
    results = {"golden": golden(stage), "plain": plain, "teacher": teacher_errors(cfg, built[0])}
    model = built[0].state_dict()["model"]
    if is_first():
        torch.save(model, folder / "model.pt")
    built[0].save_native(folder / "optim")
    results["uninterrupted"], _ = run(cfg, MORE, built=built)
    results["resumed"] = resumed(cfg, folder)

    rmlp = on_deepspeed(rmlp_config(), stage)
    results["rmlp"], built = run(rmlp)
    results["rmlp_teacher"] = teacher_errors(rmlp, built[0])
    half = replace(plain_config(), engine=EngineConfig(precision="bf16"))
    results["bf16"], built = run(on_deepspeed(half, stage))
    results["bf16_outputs"] = str(built[0].teacher(random_batch(cfg, 4)).dino.features.dtype)
    results["offloaded"], _ = run(on_deepspeed(plain_config(), stage, offload_optimizer="cpu"), bad=BAD_STEP)
    return results


def resumed(cfg, folder):
    """The steps after the saved ones, by a fresh engine."""
    dist.barrier()
    engine, method = build(cfg)
    engine.load_state_dict({"model": torch.load(folder / "model.pt", weights_only=True)})
    assert engine.load_native(folder / "optim")
    return run(cfg, MORE, built=(engine, method))[0]


def main():
    mode, stage, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    results = (
        train(stage, folder) if mode == "train" else resumed(on_deepspeed(plain_config(), stage), folder)
    )
    torch.save(results, folder / f"{mode}_{dist.get_world_size()}_{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
