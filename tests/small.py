"""A configuration small enough for unit tests, random batches that fit it, and backbones."""

from dataclasses import replace

import torch

from pretrain.batch import Batch
from pretrain.config.derived import drop_path_rates, kept_rows, vit_shape
from pretrain.config.schema import (
    Config,
    CropConfig,
    DataConfig,
    EngineConfig,
    HeadConfig,
    IbotHeadConfig,
    LocalCropConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from pretrain.models.init import init_weights
from pretrain.models.vit import VisionTransformer


def small_model(**changes) -> ModelConfig:
    """Two blocks, width 24, patch 8, images of 32 pixels; `changes` replace settings."""
    model = ModelConfig(
        arch="custom",
        embed_dim=24,
        depth=2,
        num_heads=2,
        patch_size=8,
        img_size=32,
        layer_scale=1.0,
        drop_path_rate=0.0,
    )
    return replace(model, **changes)


def random_backbone(model: ModelConfig, spread: float) -> VisionTransformer:
    """Frozen; initial weights with noise of a deviation, so that tokens attend to what they are about."""
    backbone = VisionTransformer(model, "math").eval()
    init_weights(backbone, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return backbone.requires_grad_(False)


def small_config(**sections) -> Config:
    """The small model with all that a run needs; `sections` replace whole sections."""
    cfg = Config(
        run=RunConfig(steps=20),
        model=small_model(),
        dino_head=HeadConfig(prototypes=40, hidden_dim=32, bottleneck_dim=16),
        ibot_head=IbotHeadConfig(shared=True),
        data=DataConfig(
            group_size=4,
            workers=0,
            global_crops=CropConfig(size=32),
            local_crops=LocalCropConfig(size=16, number=3),
        ),
        optim=OptimConfig(
            global_batch_size=8, lr_scaling="none", lr=1e-3, warmup_steps=2, freeze_last_layer_steps=1
        ),
        engine=EngineConfig(device="cpu", precision="fp32"),
    )
    return replace(cfg, **sections)


def random_batch(cfg: Config, images: int, seed: int = 0) -> Batch:
    """A batch of noise: masks on about half of the global crops, drop-path rows when the model has a rate."""
    generator = torch.Generator().manual_seed(seed)
    size, local = cfg.data.global_crops.size, cfg.data.local_crops
    grid = (size // cfg.model.patch_size) ** 2
    masks = torch.rand(2 * images, grid, generator=generator) < 0.3
    masks[::2] = False
    masks[1, 0] = True
    indices = masks.flatten().nonzero().flatten()
    weights = (1 / masks.sum(1).clamp(min=1).float()).repeat_interleave(masks.sum(1))
    drop = [None, None]
    if cfg.model.drop_path_rate:
        drop = [random_rows(cfg, 2 * images, generator), random_rows(cfg, local.number * images, generator)]
    return Batch(
        torch.randn(2 * images, 3, size, size, generator=generator),
        torch.randn(local.number * images, 3, local.size, local.size, generator=generator),
        masks,
        indices,
        weights,
        *drop,
        group_size=images,
        position=0,
    )


def random_rows(cfg: Config, count: int, generator: torch.Generator) -> torch.Tensor:
    """Drop-path rows (depth, 2, kept) of one share."""
    kept = max(kept_rows(rate, count) for rate in drop_path_rates(cfg.model))
    rows = [torch.randperm(count, generator=generator)[:kept] for _ in range(2 * vit_shape(cfg.model).depth)]
    return torch.stack(rows).unflatten(0, (-1, 2))
