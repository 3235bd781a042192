"""What `engine.deepspeed.extra` may not say, because another setting says it. No torch."""

from collections.abc import Mapping
from typing import Any

from pretrain.config.keys import flatten

OWNED = {  # DeepSpeed's key (with all below it): the setting in its place
    "train_batch_size": "optim.global_batch_size",
    "train_micro_batch_size_per_gpu": "optim.global_batch_size and engine.accumulation_steps",
    "gradient_accumulation_steps": "engine.accumulation_steps",
    "managed_gradient_accumulation": "engine.accumulation_steps",
    "gradient_clipping": "optim.clip_grad_norm",
    "optimizer": "section optim",
    "scheduler": "section optim",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "zero_optimization.stage": "engine.deepspeed.stage",
    "zero_optimization.offload_optimizer": "engine.deepspeed.offload_optimizer",
}
FIXED = (  # the engine rests on what it sets or leaves
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "checkpoint.load_universal",
    "zero_optimization.compute_grad_norm",  # a bad step is skipped through it
    "zero_optimization.offload_param",  # the teacher's average is taken where the partitions are
    "zero_optimization.zenflow",
)


def extra_fault(extra: Mapping[str, Any]) -> str:
    """What is wrong with `engine.deepspeed.extra`: `key: fault; fix`, or an empty text."""
    for key in (key for key, _ in flatten(extra)):
        for owned, setting in OWNED.items():
            if f"{key}.".startswith(f"{owned}."):
                return f"{owned}: is filled from {setting}; remove it here and set that"
        if any(f"{key}.".startswith(f"{fixed}.") for fixed in FIXED):
            return f"{key}: is fixed by this engine; remove it"
    return ""
