"""Weights as a model that computes."""

import torch

from pretrain.export.weights import Weights
from pretrain.models.vit import VisionTransformer


def build_backbone(weights: Weights, device: torch.device) -> VisionTransformer:
    """The model with the weights, in fp32 on a device."""
    with torch.device("meta"):
        backbone = VisionTransformer(weights.model, "sdpa")
    state = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in weights.state.items()}
    backbone.load_state_dict(state, assign=True)
    return backbone.requires_grad_(False).eval()
