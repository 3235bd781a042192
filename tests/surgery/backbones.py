"""Backbones of every kind with random weights, small but with the proportions of real ones."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain.config.schema import ModelConfig
from pretrain.models.init import init_weights
from pretrain.models.vit import VisionTransformer
from tests.small import small_model

# as a released ViT-S/14 but for its depth and grid
PLAIN = small_model(embed_dim=384, num_heads=6, patch_size=14, img_size=70)
REGISTERS = replace(
    PLAIN, embed_dim=128, num_heads=2, num_register_tokens=4, pos_embed_offset=0.0, pos_embed_antialias=True
)
GIANT = replace(REGISTERS, depth=4, ffn_layer="swiglu")
MODELS = {
    "mlp": PLAIN,
    "swiglu": replace(PLAIN, embed_dim=128, num_heads=2, depth=4, ffn_layer="swiglu"),
    "registers": REGISTERS,
    "swiglu-registers": GIANT,
    "no-layerscale": replace(PLAIN, embed_dim=64, num_heads=1, layer_scale=None),
}


def random_state(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a model, every tensor far from its start, so that each of them matters."""
    backbone = VisionTransformer(model)
    init_weights(backbone, seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in backbone.state_dict().items()
    }


def features(state: dict[str, Tensor], model: ModelConfig, images: Tensor) -> Tensor:
    """All normed tokens, by this project's model."""
    backbone = VisionTransformer(model)
    backbone.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.no_grad():
        return torch.cat([t.unsqueeze(1) if t.ndim == 2 else t for t in backbone([images])[0]], dim=1)


def images_for(model: ModelConfig, size: tuple[int, int] | None = None) -> Tensor:
    rows, columns = size or (model.img_size, model.img_width or model.img_size)
    return torch.randn(2, model.in_channels, rows, columns, generator=torch.Generator().manual_seed(3))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names and the same bits."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def place(folder: Path, target: str) -> Path:
    """A free path that a target format accepts."""
    ending = {"ours": ".safetensors", "dinov2": ".pth", "dinov2-chunked": ".pth"}.get(target, "")
    return folder / f"{target}-{len(list(folder.iterdir()))}{ending}"
