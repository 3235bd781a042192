"""A few training steps on noise under any engine, as one of the ranks of a process group or alone."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.batch import Batch
from pretrain.config.schema import (
    Config,
    EngineConfig,
    Fsdp2Config,
    HeadConfig,
    IbotHeadConfig,
    LossConfig,
    MaskConfig,
    MethodConfig,
    RmlpConfig,
    TeacherConfig,
)
from pretrain.data.collate import collate
from pretrain.data.slots import SlotLayout
from pretrain.data.synthetic import fill_with_noise
from pretrain.distributed import all_sum, rank, world_size
from pretrain.optim.schedules import Schedules
from pretrain.run.profiling import PhaseTimer
from pretrain.start import build_branches, fill_weights
from pretrain.train import Run, build_engine, train_step
from tests.small import small_config

GROUP, BATCH, STEPS, FROZEN = 4, 16, 8, 3
MASKED = (0, 5, 17, None)  # patches that are masked in each group of a batch; None = as drawn
CPU = torch.device("cpu")


def curve_config(head: str = "mlp", **engine: Any) -> Config:
    """Drop path 0.3; MLP heads with Sinkhorn, or randomized ones, or both (`mix`), or SwAV with a queue.

    With `change` the randomized ones begin at step 4, and the backbone is frozen before step `FROZEN`.
    """
    base = small_config()
    small = {"prototypes": 24, "hidden_dim": 16, "bottleneck_dim": 8}
    if head == "swav":
        return swav_config(curve_config(**engine), small)
    kind: Any = "rmlp" if head == "change" else head
    rmlp = RmlpConfig(outputs=48, start_step=4 if head == "change" else 0)
    if head == "mix":  # the share goes from 0 to 1, the amplitude from 5 to 2
        ends = {"amplitude_end": 2.0, "mix": 0.0, "mix_end": 1.0}
        rmlp = RmlpConfig(outputs=24, schedule="linear", schedule_steps=STEPS - 1, **ends)
    return replace(
        base,
        dino_head=HeadConfig(kind=kind, **small),
        ibot_head=IbotHeadConfig(kind=kind, shared=False, **small),
        run=replace(base.run, steps=20),
        model=replace(base.model, drop_path_rate=0.3, num_register_tokens=2),
        rmlp=rmlp,
        loss=LossConfig(centering="sinkhorn" if head == "mlp" else "softmax"),
        data=replace(base.data, group_size=GROUP),
        optim=replace(
            base.optim,
            global_batch_size=BATCH,
            lr=2e-3,
            freeze_backbone_steps=FROZEN if head == "change" else 0,
        ),
        engine=EngineConfig(**{"device": "cpu", "precision": "fp32", **engine}),
    )


def swav_config(cfg: Config, head: dict[str, int]) -> Config:
    return replace(
        cfg,
        method=MethodConfig("swav", queue=2 * BATCH, queue_start_step=1),
        dino_head=HeadConfig(norm_last_layer=True, **head),
        ibot_head=IbotHeadConfig(),
        loss=LossConfig(centering="sinkhorn", ibot_weight=0.0, koleo_weight=0.1),
        mask=MaskConfig(probability=0.0),
        teacher=TeacherConfig(0.0, 0.0, 0.05, 0.05, 0),
    )


def micro_batches(cfg: Config, step: int) -> list[Batch]:
    """This rank's micro-batches of a step: the global batch does not depend on the number of ranks."""
    size = BATCH // (world_size() * cfg.engine.accumulation_steps)
    first = rank() * cfg.engine.accumulation_steps
    return [noise(cfg, step, (first + i) * size, size) for i in range(cfg.engine.accumulation_steps)]


def noise(cfg: Config, step: int, start: int, size: int) -> Batch:
    slot = SlotLayout(cfg, size).allocate()
    for i in range(size // GROUP):
        number = start // GROUP + i
        group = slot.group(i)
        fill_with_noise(cfg, group, step * BATCH + number * GROUP)
        count = MASKED[(number + step) % len(MASKED)] if cfg.mask.probability else 0
        if count is not None:
            group.masks[:] = False
            group.masks[1, : min(count, 12)] = True
            group.masks[2, : count - min(count, 12)] = True
    return collate(slot, step * BATCH + start)


def train(kind: str, head: str = "mlp", steps: int = STEPS, **engine: Any) -> dict[str, Any]:
    """Losses and gradient norms by step, final weights, and what the teacher makes of a fixed batch."""
    settings = dict(engine)
    replicate = settings.pop("replicate", 1)
    cfg = curve_config(head, kind=kind, fsdp2=Fsdp2Config(replicate=replicate), **settings)
    size = BATCH // (world_size() * cfg.engine.accumulation_steps)
    student, teacher, method = build_branches(cfg, CPU, size, on_meta=kind == "fsdp2")
    run_engine = build_engine(cfg, student, teacher, method, CPU)
    fill_weights(cfg, student, teacher)
    run = Run(cfg, Path(), run_engine, method, None, Schedules(cfg), None, 0)  # type: ignore[arg-type]
    losses, norms = [], []
    for step in range(steps):
        batches = micro_batches(cfg, step)
        result, observation = train_step(run, step, run.schedules.at(step), batches, PhaseTimer(CPU))
        parts = torch.stack([torch.stack(list(part.values())) for part in observation.losses]).mean(0)
        losses.append((all_sum(parts) / world_size()).tolist())
        norms.append({name: float(norm) for name, norm in result.grad_norms.items()})
    drawn = [w for head in (*student.rmlp.values(), *teacher.rmlp.values()) for w in head.weights]
    seen = run_engine.teacher(noise(cfg, 99, 0, BATCH))
    return {
        "losses": losses,
        "norms": norms,
        "student": run_engine.full_state_dict("student"),
        "teacher": run_engine.full_state_dict("teacher"),
        "teacher_cls": seen.cls,
        "features": run_engine.features(torch.ones(2, 3, 32, 32)).patches,
        "drawn": digests(drawn),
        "centers": method.state_dict(),
        "dtypes": sorted(
            {str(value.dtype) for named in run_engine.state_dict().values() for value in named.values()}
        ),
    }


def digests(tensors: list[torch.Tensor]) -> list[str]:
    """What the ranks hold, bit for bit: one entry where all hold the same."""
    mine = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
    all_of_them = [mine] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(all_of_them, mine)
    return sorted(set(all_of_them))


def several(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One start of the ranks for many runs."""
    results = []
    for case in cases:
        results.append(train(**case))
        if dist.is_initialized():
            dist.barrier()
    return results
