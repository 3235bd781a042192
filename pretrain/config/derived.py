"""Values that follow from the configuration: functions, so that nothing mutates it. No torch."""

import math
from typing import NamedTuple

from pretrain.config.schema import (
    Config,
    DataConfig,
    HeadConfig,
    HeadKind,
    IbotHeadConfig,
    ModelConfig,
    OptimConfig,
)
from pretrain.errors import InputError

ARCHITECTURES = {  # (embed_dim, depth, num_heads), DINOv2's names and numbers
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}


class VitShape(NamedTuple):
    """Width, depth and number of attention heads of a backbone."""

    embed_dim: int
    depth: int
    num_heads: int


def vit_shape(model: ModelConfig) -> VitShape:
    """The backbone's shape: from the named architecture, or from the fields of arch=custom."""
    if model.arch == "custom":
        return VitShape(model.embed_dim or 0, model.depth or 0, model.num_heads or 0)
    return VitShape(*ARCHITECTURES[model.arch])


def ffn_hidden_dim(model: ModelConfig) -> int:
    """Hidden width of the feed-forward layer; SwiGLU takes 2/3 of it, rounded up to a multiple of 8."""
    hidden = int(vit_shape(model).embed_dim * model.ffn_ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if model.ffn_layer == "swiglu" else hidden


def shard_settings(data: DataConfig) -> dict[str, list[str]]:
    """The shards that training reads, by the setting that names them: `data.shards` or those of sources."""
    if data.sources:
        return {f"data.sources.{i}.shards": source.shards for i, source in enumerate(data.sources)}
    return {"data.shards": data.shards}


def position_grid(model: ModelConfig) -> tuple[int, int]:
    """Rows and columns of the learned position embeddings."""
    width = model.img_size if model.img_width is None else model.img_width
    return model.img_size // model.patch_size, width // model.patch_size


def prefix_tokens(model: ModelConfig) -> int:
    """Tokens before the patches: class token, trained registers and, last, the test-time register."""
    return 1 + model.num_register_tokens + bool(model.register_neurons)


def drop_path_rates(model: ModelConfig) -> tuple[float, ...]:
    """Drop-path rate of each block."""
    depth = vit_shape(model).depth
    if model.drop_path_uniform or depth == 1:
        return (model.drop_path_rate,) * depth
    return tuple(model.drop_path_rate * i / (depth - 1) for i in range(depth))


def kept_rows(rate: float, count: int) -> int:
    """Of `count` sequences, how many keep a residual branch under a drop-path rate (DINOv2's rounding)."""
    return max(int(count * (1 - rate)), 1)


def peak_lr(optim: OptimConfig) -> float:
    """Learning rate at the end of the warm-up, after batch-size scaling."""
    if optim.lr_scaling == "none":
        return optim.lr
    return optim.lr * math.sqrt(optim.global_batch_size / 1024)


def micro_batch_size(cfg: Config, world_size: int) -> int:
    """Images in one forward on one device: whole groups.

    Raises:
        InputError: the global batch does not divide over devices, accumulation and groups.
    """
    parts = world_size * cfg.engine.accumulation_steps
    size, rest = divmod(cfg.optim.global_batch_size, parts)
    if rest or size % cfg.data.group_size:
        raise InputError(
            f"optim.global_batch_size={cfg.optim.global_batch_size} over {world_size} device(s) x "
            f"engine.accumulation_steps={cfg.engine.accumulation_steps} must be whole groups of "
            f"data.group_size={cfg.data.group_size} images"
        )
    return size


def ibot_head(cfg: Config) -> HeadConfig | IbotHeadConfig:
    """The section that describes the head of the masked-patch loss."""
    return cfg.dino_head if cfg.ibot_head.shared else cfg.ibot_head


def head_kinds(cfg: Config) -> set[HeadKind]:
    """Kinds of the two heads."""
    return {cfg.dino_head.kind, ibot_head(cfg).kind}


def uses_rmlp(cfg: Config) -> bool:
    """Whether any head is randomized, alone or in a mixture."""
    return head_kinds(cfg) != {"mlp"}


class Strength(NamedTuple):
    """What is randomized heads' own of a step."""

    amplitude: float  # a of their weights
    mix: float  # share of their logits where a trainable head is mixed in


def rmlp_strength(cfg: Config, step: int) -> Strength:
    """Amplitude and share at a step (0-based), by `rmlp.schedule`; a function of the step alone."""
    rmlp = cfg.rmlp
    steps = rmlp.schedule_steps or cfg.run.steps - rmlp.start_step
    done = min(max(step - rmlp.start_step, 0) / max(steps - 1, 1), 1.0)  # 1 at the last of the steps
    if rmlp.schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    amplitude = _between(rmlp.amplitude, rmlp.amplitude_end, done)
    return Strength(amplitude, _between(rmlp.mix, rmlp.mix_end, done))


def _between(start: float, end: float | None, done: float) -> float:
    """Both ends are reached exactly: a share of 1 takes the trainable head out."""
    if end is None or done == 0:
        return start
    return end if done == 1 else start + (end - start) * done


def rmlp_widths(embed_dim: int, outputs: int) -> tuple[int, ...]:
    """Widths of a randomized head: of its input and of its four layers."""
    return (embed_dim, 4 * embed_dim, 4 * embed_dim, 2 * embed_dim // 3, outputs)


def signal_outputs(cfg: Config) -> int:
    """How many of a randomized head's outputs carry more than noise: those that the identity path reaches."""
    *_, bottleneck, outputs = rmlp_widths(vit_shape(cfg.model).embed_dim, cfg.rmlp.outputs)
    return min(outputs, bottleneck) if cfg.rmlp.identity else outputs


def sinkhorn_outputs(cfg: Config, kind: HeadKind, step: int) -> int | None:
    """Among how many first outputs of a head Sinkhorn-Knopp shares the mass; None = all of them.

    A randomized head's other outputs hold noise, which would be filled with most of the mass; those of a
    mixture hold the trainable head's logits.
    """
    return signal_outputs(cfg) if kind == "rmlp" and step >= cfg.rmlp.start_step else None
