"""The useful operations of a training step, from its configuration: what any implementation has to do.

Only matrix products count, a multiply-add as two operations: linear layers, attention, patch embedding, heads
and logits. Norms, softmax, losses, optimizer and EMA are left out, and so is what an implementation does
twice to save memory. For one image:

    backbone, student   3 x forward of 2 global and L local crops (backward = 2 x forward), times the share
                        of sequences that drop path keeps; 2 x for the patch embedding, which passes none on
    backbone, teacher   1 x forward of 2 global crops
    last block          its feed-forward layer on class tokens and masked patches alone; nothing reads others
    heads, student      3 x forward of 2 + L class tokens and the masked patches; 2 x for randomized heads,
                        whose weights need no gradient; a mixture is both, with one product for its logits
    heads, teacher      1 x forward of 2 class tokens and the same patches
    a block             n (8 D^2 + 2 F) + 4 n^2 D for a sequence of n tokens, F feed-forward weights
"""

from itertools import pairwise
from typing import NamedTuple

from pretrain.config.derived import (
    drop_path_rates,
    ffn_hidden_dim,
    ibot_head,
    kept_rows,
    prefix_tokens,
    rmlp_strength,
    rmlp_widths,
    vit_shape,
)
from pretrain.config.schema import Config, HeadConfig, ModelConfig


class Flops(NamedTuple):
    """Operations for one image: forward and backward of the student, forward of the teacher."""

    backbone: float
    heads: float


def flops_per_image(cfg: Config) -> Flops:
    """Useful operations of the first step for one image, with masks of the mean size that `mask` draws."""
    return Flops(_backbone(cfg), _heads(cfg))


def _backbone(cfg: Config) -> float:
    data, model, group = cfg.data, cfg.model, cfg.data.group_size
    large, small = _crop(model, data.global_crops.size), _crop(model, data.local_crops.size)
    student = 0.0
    for number, crop in ((2, large), (data.local_crops.number, small)):
        attention, ffn = _kept_blocks(model, number * group)
        student += number * (2 * crop.embedding + 3 * (attention * crop.attention + ffn * crop.ffn))
    depth = vit_shape(model).depth
    teacher = 2 * (large.embedding + depth * large.attention + (depth - 1) * large.ffn)
    used = 3 * (2 + data.local_crops.number + masked_patches(cfg)) + 2 + masked_patches(cfg)
    return student + teacher + used * _ffn_per_token(model)


class _Crop(NamedTuple):
    """Forward operations for one crop."""

    embedding: float
    attention: float  # of a block
    ffn: float  # of a block


def _crop(model: ModelConfig, size: int) -> _Crop:
    dim = vit_shape(model).embed_dim
    patches = (size // model.patch_size) ** 2
    tokens = prefix_tokens(model) + patches
    embedding = 2 * patches * model.in_channels * model.patch_size**2 * dim
    attention = tokens * 8 * dim**2 + 4 * tokens**2 * dim
    return _Crop(embedding, attention, tokens * _ffn_per_token(model))


def _ffn_per_token(model: ModelConfig) -> float:
    return 2 * (3 if model.ffn_layer == "swiglu" else 2) * vit_shape(model).embed_dim * ffn_hidden_dim(model)


def _kept_blocks(model: ModelConfig, count: int) -> tuple[float, float]:
    """Attention layers, and feed-forward layers but the last, that a sequence runs through on average.

    `count` sequences share a drop-path subset.
    """
    shares = [kept_rows(rate, count) / count if rate else 1.0 for rate in drop_path_rates(model)]
    return sum(shares), sum(shares[:-1])


def _heads(cfg: Config) -> float:
    dim, patches = vit_shape(cfg.model).embed_dim, masked_patches(cfg)
    student_classes = 2 + cfg.data.local_crops.number
    total = 0.0
    for head, student, teacher in (
        (cfg.dino_head, student_classes, 2.0),
        (ibot_head(cfg), patches, patches),
    ):
        weights = _head_weights(cfg, dim, head)
        total += 2 * (weights.trained * (3 * student + teacher) + weights.drawn * (2 * student + teacher))
    return total


class _Weights(NamedTuple):
    """Multiply-adds of a row in a head's matrices: those that take a gradient, and the others."""

    trained: int
    drawn: int


def _head_weights(cfg: Config, dim: int, head: HeadConfig) -> _Weights:
    mlp, rmlp = _mlp_widths(dim, head), rmlp_widths(dim, cfg.rmlp.outputs)
    trained, drawn = (sum(n * m for n, m in pairwise(widths)) for widths in (mlp, rmlp))
    if head.kind == "mlp" or cfg.rmlp.start_step > 0:
        return _Weights(trained, 0)
    if head.kind == "rmlp":
        return _Weights(0, drawn)
    logits = rmlp[-2] * rmlp[-1]
    return _Weights(trained + logits, drawn - logits) if rmlp_strength(cfg, 0).mix else _Weights(trained, 0)


def _mlp_widths(dim: int, head: HeadConfig) -> tuple[int, ...]:
    return (dim, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim, head.prototypes)


def masked_patches(cfg: Config) -> float:
    """Masked patches per image, on average over the draws of `group_masks`."""
    crops, patches = 2 * cfg.data.group_size, (cfg.data.global_crops.size // cfg.model.patch_size) ** 2
    masked_crops = int(crops * cfg.mask.probability) / crops * 2
    return masked_crops * (patches * sum(cfg.mask.ratio) / 2 - 0.5)  # a crop's number is rounded down
