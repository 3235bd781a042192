"""The numbers that each setting may hold on its own. No torch."""

import math
from collections.abc import Callable
from typing import NamedTuple

from pretrain.config.keys import settings
from pretrain.config.schema import Config


class Bound(NamedTuple):
    """A condition on numbers, and the keys (separated by spaces) that must meet it."""

    text: str
    holds: Callable[[float], bool]
    keys: str


BOUNDS = (
    Bound(
        "at least 1",
        lambda value: value >= 1,
        """
        run.steps model.embed_dim model.depth model.num_heads model.patch_size model.img_size model.img_width
        model.in_channels optim.max_bad_steps dino_head.hidden_dim dino_head.bottleneck_dim
        dino_head.num_layers ibot_head.hidden_dim ibot_head.bottleneck_dim ibot_head.num_layers
        loss.sinkhorn_iterations data.open_shards data.group_size data.prefetch data.decode.max_pixels
        data.io_attempts
        data.global_crops.size data.local_crops.size data.local_crops.number mask.min_patches mask.bucket
        optim.global_batch_size engine.accumulation_steps engine.fsdp2.replicate checkpoint.every
        checkpoint.keep checkpoint.export_every log.every log.knn.k log.knn.resize log.knn.crop
        log.knn.batch_size log.images.number log.artifacts.number run.preemption_check_every
        cluster.nodes cluster.tasks_per_node cluster.cpus_per_task cluster.max_crashes
        """,
    ),
    Bound("between 1 and 128", lambda value: 1 <= value <= 128, "data.channels"),  # 128: OpenCV's limit
    Bound("1, 2 or 3", lambda value: value in (1, 2, 3), "engine.deepspeed.stage"),
    Bound("at least 2", lambda value: value >= 2, "dino_head.prototypes ibot_head.prototypes rmlp.outputs"),
    Bound(
        "0 or more",
        lambda value: value >= 0,
        """
        run.seed model.num_register_tokens model.pos_embed_offset rmlp.amplitude rmlp.amplitude_end
        rmlp.resample_every rmlp.schedule_steps rmlp.start_step
        loss.dino_weight loss.ibot_weight loss.koleo_weight teacher.temp_warmup_steps
        data.workers data.augment.brightness data.augment.contrast data.augment.saturation optim.min_lr
        optim.warmup_steps optim.weight_decay optim.weight_decay_end optim.patch_embed_lr_mult
        optim.clip_grad_norm optim.spike_factor optim.freeze_last_layer_steps
        optim.freeze_backbone_steps checkpoint.keep_every
        log.knn.every log.images.every log.artifacts.every log.norms_every engine.hang_timeout
        method.queue method.queue_start_step
        cluster.gpus_per_node cluster.mem_gb cluster.max_restarts cluster.max_bad_nodes
        cluster.preflight_timeout cluster.min_free_gb
        """,
    ),
    Bound(
        "above 0",
        lambda value: value > 0,
        """
        model.ffn_ratio model.layer_scale loss.student_temp teacher.warmup_temp teacher.temp optim.lr
        log.knn.temperature data.worker_timeout data.cache.max_gb data.io_timeout
        engine.timeout cluster.images_per_s
        """,
    ),
    Bound(
        "between 0 and 1",
        lambda value: 0 <= value <= 1,
        """
        rmlp.mix rmlp.mix_end loss.center_momentum teacher.momentum teacher.final_momentum mask.probability
        data.max_corrupt
        data.augment.flip_probability data.augment.jitter_probability data.augment.grayscale_probability
        data.augment.solarize_probability
        """,
    ),
    Bound(
        "at least 0 and below 1", lambda value: 0 <= value < 1, "model.drop_path_rate optim.beta1 optim.beta2"
    ),
    Bound("above 0 and at most 1", lambda value: 0 < value <= 1, "optim.layerwise_decay mask.min_aspect"),
    Bound("between 10 and 65535", lambda value: 10 <= value <= 65535, "cluster.signal_seconds"),  # sbatch's
    Bound("between 0 and 0.5", lambda value: 0 <= value <= 0.5, "data.augment.hue"),
)

LARGEST = 2**63  # what torch, numpy and the files of a run hold in an integer
RANGES = ("data.global_crops.scale", "data.local_crops.scale", "mask.ratio")


def check_bounds(cfg: Config) -> None:
    """Refuse numbers that are out of bounds whatever the other settings are.

    Raises:
        ValueError: `section.key: must be ..., got ...`.
    """
    values = settings(cfg)
    for key, value in values.items():
        if any(isinstance(item, int) and abs(item) >= LARGEST for item in numbers(value)):
            raise ValueError(f"{key}: must be below 2^63")
        if not all(math.isfinite(item) for item in numbers(value)):
            raise ValueError(f"{key}: must be finite, got {value}")
    for bound in BOUNDS:
        for key in bound.keys.split():
            if not all(bound.holds(number) for number in numbers(values[key])):
                raise ValueError(f"{key}: must be {bound.text}, got {values[key]}")
    for key in RANGES:
        if not _is_range(values[key]):
            wanted = "[smallest, largest] with 0 < smallest <= largest <= 1"
            raise ValueError(f"{key}: must be {wanted}, got {values[key]}")


def numbers(value: object) -> list[float]:
    """The numbers in a setting: itself or its items; none in a text, a switch or null."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]


def _is_range(value: list[float]) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1] <= 1
