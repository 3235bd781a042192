"""A backbone with a defect that can be repaired: a hidden unit of a middle block that few patches trigger."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pretrain.analysis.images import RGB
from pretrain.config.schema import ModelConfig
from pretrain.models.init import init_weights
from pretrain.models.packing import Layout
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.hits import run_block
from tests.small import small_model

BLOCK = 2  # that gets the defect
GAINS = {"mlp-registers": 14.0}  # of the planted unit; its limit is rarer there, which the prediction feels
SHARP = 16.0  # slope of the unit at its limit: patches below it hardly notice
PLAIN = small_model(embed_dim=64, depth=6, num_heads=4, img_size=128)  # 16 x 16 patches
MODELS = {
    "mlp": PLAIN,
    "mlp-registers": replace(PLAIN, num_register_tokens=4),
    "swiglu": replace(PLAIN, ffn_layer="swiglu"),
    "swiglu-registers": replace(PLAIN, ffn_layer="swiglu", num_register_tokens=4),
}


def noise(number: int, seed: int) -> Tensor:
    """Images of noise with some structure: (n, 3, 128, 128)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(number, 3, 16, 16, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=128, mode="nearest") + 0.3 * torch.randn(
        number, 3, 128, 128, generator=generator
    )


@torch.no_grad()
def clean_backbone(model: ModelConfig) -> VisionTransformer:
    """Random weights under which tokens grow evenly; the class token and registers have their own content."""
    backbone = VisionTransformer(model, "math")
    init_weights(backbone, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in backbone.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("weight") and parameter.ndim == 2:
            parameter.copy_(drawn / parameter.shape[1] ** 0.5 / 2)
        if name in ("cls_token", "register_tokens"):
            parameter.copy_(2 * drawn)
    return backbone


@torch.no_grad()
def ffn_inputs(backbone: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the feed-forward layer of BLOCK sees: prefix tokens (n, 1 + R, D), patches (n, N, D)."""
    tokens = backbone.embed(images)
    for index in range(BLOCK):
        tokens = run_block(backbone, index, tokens)
    block, (number, length, _) = backbone.blocks[BLOCK], tokens.shape
    flat = tokens.flatten(0, 1)
    flat = flat + block.ls1(block.attn(block.norm1(flat), Layout((number,), (length,))))
    inputs = block.norm2(flat).unflatten(0, (number, length))
    prefix = 1 + backbone.cfg.num_register_tokens
    return inputs[:, :prefix], inputs[:, prefix:]


@torch.no_grad()
def plant(backbone: VisionTransformer, share: float = 0.015, gain: float = 6.0) -> Tensor:
    """Let `share` of the patches grow along a direction in block BLOCK; returns that direction (D,).

    Class token and registers stay out of it: what triggers the unit is orthogonal to them.
    """
    generator = torch.Generator().manual_seed(2)
    direction, trigger = torch.randn(2, backbone.embed_dim, generator=generator)
    direction = direction - direction.mean()
    direction /= direction.norm()
    prefix, patches = ffn_inputs(backbone, noise(16, seed=99))
    others = torch.linalg.qr(torch.cat([prefix.mean(0), torch.ones_like(prefix[0, :1])]).T)[0]
    trigger -= others @ (others.T @ trigger)
    trigger /= trigger.norm()
    limit = torch.quantile((patches @ trigger).flatten(), 1 - share).item()
    ffn = backbone.blocks[BLOCK].mlp
    first, last = (ffn.fc1, ffn.fc2) if backbone.cfg.ffn_layer == "mlp" else (ffn.w12, ffn.w3)
    first.weight[0], first.bias[0] = SHARP * trigger, -SHARP * limit
    if backbone.cfg.ffn_layer == "swiglu":  # the value beside the gate is 1
        half = first.weight.shape[0] // 2
        first.weight[half], first.bias[half] = 0.0, 1.0
    last.weight[:, 0] = gain * direction
    return direction


def write_images(folder: Path, number: int) -> Path:
    """Image files of such noise, as a model sees it after normalisation."""
    folder.mkdir(parents=True)
    for index, image in enumerate(noise(number, seed=7)):
        pixels = (RGB.shown(image) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:04d}.png")
    return folder
