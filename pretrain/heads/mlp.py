"""DINOv2's projection head: MLP, L2-normalised bottleneck, weight-normed prototypes."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pretrain.config.schema import HeadConfig
from pretrain.projection import Projection, compute_dtype


class Prototypes(nn.Module):
    """K directions: weight = g * v / |v| per row (released key names).

    Lengths g are 1 at first and trained, or 1 for good and no parameters.
    """

    def __init__(self, num_prototypes: int, dim: int, norm_last_layer: bool) -> None:
        super().__init__()
        lengths = None if norm_last_layer else nn.Parameter(torch.empty(num_prototypes, 1))
        self.weight_g: nn.Parameter | None
        self.register_parameter("weight_g", lengths)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim))

    def forward(self) -> Tensor:
        """The weight-normed matrix (K, b)."""
        v = self.weight_v
        g = v.new_ones(len(v), 1) if self.weight_g is None else self.weight_g
        return torch._weight_norm(v, g, 0)  # one pass, and one in the backward


class MlpHead(nn.Module):
    """Linear-GELU layers to a bottleneck, compared with the prototypes on the unit sphere."""

    def __init__(self, in_dim: int, cfg: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[cfg.hidden_dim] * (cfg.num_layers - 1), cfg.bottleneck_dim]
        layers: list[nn.Module] = []
        for n, m in pairwise(widths):
            layers += [nn.Linear(n, m), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(cfg.prototypes, cfg.bottleneck_dim, cfg.norm_last_layer)
        self.out_dim = cfg.prototypes

    def forward(self, x: Tensor) -> Projection:
        """Normed tokens (rows, D) to features (rows, b) and prototypes (K, b)."""
        features = normalize(self.mlp(x).float(), dim=-1, eps=1e-12)
        dtype = compute_dtype(x)
        return Projection(features.to(dtype), self.last_layer().to(dtype))
