"""Any recipe at a size that trains in a second on a CPU: what costs is shrunk, all else stays. No torch.

Method, heads, losses, weights, temperatures, centring, masks, number and scales of crops, augmentation and
the shape of every schedule are the recipe's: a toy run computes what a recipe does, with smaller tensors.
"""

from typing import Any

from pretrain.config.derived import peak_lr
from pretrain.config.schema import Config, OptimConfig

STEPS = 10
BATCH, GROUP = 16, 4  # images in a step, in a group
PEAK_LR = 0.002  # at which the loss moves within the steps
OUTPUTS = 64  # prototypes, and outputs of a randomized head: more than the 2D // 3 that carry its signal
WIDTH = 48  # of the backbone
LAYER_SCALE = 1.0  # where there is one; at 1e-5 blocks have no part in ten steps, KoLeo measures rounding

SIZE = {  # what a forward costs
    "model.arch": "custom",
    "model.embed_dim": WIDTH,
    "model.depth": 2,
    "model.num_heads": 3,
    "model.patch_size": 8,
    "model.img_size": 32,
    "model.img_width": "null",
    "dino_head.prototypes": OUTPUTS,
    "dino_head.hidden_dim": 64,
    "dino_head.bottleneck_dim": 32,
    "rmlp.outputs": OUTPUTS,
    "data.group_size": GROUP,
    "data.global_crops.size": 32,
    "data.local_crops.size": 16,
    "optim.global_batch_size": BATCH,
}
OWN_IBOT_HEAD = {  # other sizes than the class tokens' head: a mix-up would show
    "ibot_head.prototypes": 48,
    "ibot_head.hidden_dim": 64,
    "ibot_head.bottleneck_dim": 16,
}
EXECUTION = {  # one process on the CPU in fp32, whatever the recipe asks of its machines
    "data.sources": [],
    "data.workers": 0,
    "engine.kind": "single",
    "engine.device": "cpu",
    "engine.precision": "fp32",
    "engine.compile": "false",
    "checkpoint.every": STEPS,
    "checkpoint.export_every": STEPS,
    "checkpoint.asynchronous": "false",
    "checkpoint.resume_from": "",
    "log.every": 1,
    "log.tensorboard": "false",
    "log.profile_steps": [],
    "log.knn.train": [],
    "log.knn.test": [],
    "log.images.shards": [],
    "log.artifacts.shards": [],
}
SPANS = {  # numbers of steps, each a share of the run
    "optim": ("warmup_steps", "freeze_last_layer_steps", "freeze_backbone_steps"),
    "teacher": ("temp_warmup_steps",),
    "rmlp": ("start_step", "schedule_steps"),
    "method": ("queue_start_step",),
}
MODEL = ("ffn_layer", "ffn_ratio", "num_register_tokens", "in_channels")


def toy_overrides(cfg: Config, shards: str) -> list[str]:
    """The `key=value` settings that make a recipe a toy.

    Args:
        cfg: of the recipe.
        shards: of 32-px images, such as those of `pretrain.data.digits`.
    """
    values: dict[str, Any] = {"run.steps": STEPS, **SIZE, **EXECUTION, "data.shards": [shards]}
    if not cfg.ibot_head.shared:
        values |= OWN_IBOT_HEAD
    if cfg.model.layer_scale is not None:
        values["model.layer_scale"] = LAYER_SCALE
    values |= _spans(cfg) | _rates(cfg.optim)
    values["method.queue"] = cfg.method.queue // cfg.optim.global_batch_size * BATCH
    values["engine.accumulation_steps"] = 2 if cfg.engine.accumulation_steps > 1 else 1
    return [f"{key}={_text(value)}" for key, value in values.items()]


def first_phase_overrides(cfg: Config) -> list[str]:
    """Settings with which a toy of trainable heads makes the backbone that a second phase starts from.

    Args:
        cfg: of the second phase.
    """
    values: dict[str, Any] = {f"model.{name}": getattr(cfg.model, name) for name in MODEL}
    values |= {f"data.{name}": getattr(cfg.data, name) for name in ("channels", "mean", "std")}
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _spans(cfg: Config) -> dict[str, int]:
    """Warm-ups and the like in proportion; one step at least, where there is any."""
    spans: dict[str, int] = {}
    for section, names in SPANS.items():
        for name in names:
            steps = getattr(getattr(cfg, section), name)
            scaled = round(steps / cfg.run.steps * STEPS)
            spans[f"{section}.{name}"] = max(scaled, 1) if steps else 0
    return spans


def _rates(optim: OptimConfig) -> dict[str, float]:
    """One peak learning rate for all, by the recipe's own scaling; a constant one stays constant."""
    constant = optim.min_lr == peak_lr(optim)
    scaled = PEAK_LR / (BATCH / 1024) ** 0.5 if optim.lr_scaling == "sqrt_1024" else PEAK_LR
    return {"optim.lr": scaled, "optim.min_lr": PEAK_LR if constant else min(optim.min_lr, PEAK_LR)}


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
