"""DeepSpeed's own configuration, made from ours; `engine.deepspeed.extra` is merged last."""

from collections.abc import Mapping
from typing import Any

from pretrain.config.schema import EngineConfig, OptimConfig

BUCKET = 50_000_000  # elements that are reduced or gathered at once: 200 MB in fp32 (DeepSpeed's own: 2 GB)


def deepspeed_settings(optim: OptimConfig, engine: EngineConfig, world_size: int) -> dict[str, Any]:
    """The student's configuration. `extra` holds none of these keys: see `config.deepspeed_extra.OWNED`."""
    parts = engine.accumulation_steps
    zero: dict[str, Any] = {
        "stage": engine.deepspeed.stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if engine.deepspeed.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = {
        "train_batch_size": optim.global_batch_size,
        "train_micro_batch_size_per_gpu": optim.global_batch_size // (parts * world_size),
        "gradient_accumulation_steps": parts,
        "gradient_clipping": 0.0,  # DeepSpeed knows one norm of the whole model; ours are per sub-module
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # likewise; DeepSpeed's own would be compiled first
        "zero_optimization": zero,
        "torch_autocast": _autocast(engine),
        "steps_per_print": None,
    }
    return merged(settings, engine.deepspeed.extra)


def teacher_settings(student: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a partitioned teacher, of which nothing may stay gathered and grow stale.

    The EMA changes the partitions alone. DeepSpeed keeps small parameters whole, and those that are used
    again soon: it takes for granted that only its own optimizer changes them.
    """
    whole = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    zero = {key: value for key, value in student["zero_optimization"].items() if key != "offload_optimizer"}
    return {**student, "zero_optimization": {**zero, **whole}}


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `more` laid over it, section by section."""
    result = dict(base)
    for key, value in more.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if nested else value
    return result


def _autocast(engine: EngineConfig) -> dict[str, Any]:
    """bf16 compute over fp32 parameters. The empty list keeps reduction and gathering in fp32."""
    enabled = engine.precision == "bf16"
    return {"enabled": enabled, "dtype": "bfloat16", "lower_precision_safe_modules": []}
