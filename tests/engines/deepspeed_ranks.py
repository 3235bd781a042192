"""One rank of the DeepSpeed tests: several checks in one start, their numbers as JSON.

python -m tests.engines.deepspeed_ranks STAGE FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

import json
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
from tests.golden_files import load, relative_error, section
from tests.test_golden import branch_weights, golden_batch, key_bias_removed, step_config

CPU = torch.device("cpu")


def engine_config(stage, **more):
    return EngineConfig(
        kind="deepspeed", device="cpu", precision="fp32", deepspeed=DeepspeedConfig(stage=stage), **more
    )


def golden(stage):
    arrays, meta = load("step_two_ranks")
    init, final = section(arrays, "init/"), section(arrays, "final/")
    cfg = step_config(meta, init)
    size = meta["settings"]["batch_per_rank"]
    cfg = replace(cfg, engine=engine_config(stage), optim=replace(cfg.optim, global_batch_size=2 * size))
    student, teacher, method = SSLBranch(cfg, "student"), SSLBranch(cfg, "teacher"), DinoV2(cfg)
    student.load_state_dict(branch_weights(init, "student"))
    teacher.load_state_dict(branch_weights(init, "teacher"))
    engine = build_deepspeed(student, teacher, method, cfg.optim, cfg.engine, CPU)
    schedules, errors, norms = Schedules(cfg), [], []
    for step, expected in enumerate(meta["steps"]):
        batch, values = golden_batch(arrays, step, size, dist.get_rank()), schedules.at(step)
        engine.begin_step(step, values)
        targets = method.targets([engine.teacher(batch)], [batch.mask_weights], values.teacher_temp, step)
        terms = method.losses(engine.student(batch), targets[0], batch)
        engine.backward(terms.total)
        result = engine.step()
        method.commit(result.good)
        engine.update_teacher(values.momentum)
        losses = expected["rank_losses"][dist.get_rank()]
        pairs = {
            "dino_local": losses["dino_local_crops_loss"],
            "dino_global": losses["dino_global_crops_loss"],
            "ibot": 2 * losses["ibot_loss"],
            "koleo": 2 * losses["koleo_loss"] / cfg.loss.koleo_weight,
        }
        errors += [abs(terms.parts[k].item() / v - 1) for k, v in pairs.items()]
        norms += [abs(result.grad_norms[k].item() / v - 1) for k, v in expected["grad_norm"].items()]
    weights = {}
    for branch in ("student", "teacher"):
        whole = engine.full_state_dict(branch)
        for key, value in branch_weights(final, branch).items():
            weights[f"{branch}.{key}"] = relative_error(key_bias_removed(key, whole[key]), key_bias_removed(key, value))
    return {"losses": max(errors), "norms": max(norms), "weights": max(weights.values())}


def main():
    stage, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    results = {"golden": golden(stage)}
    print(json.dumps(results))
    (folder / f"stage{stage}_rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
