"""The student or teacher of the plain baseline of `step.py`: backbone and heads in DINOv2's own way.

Parameters are named as in `SSLBranch`, so that weights can be copied. Shapes: the legend of `pretrain.batch`.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config.derived import ffn_hidden_dim, vit_shape
from pretrain.config.schema import Config, HeadConfig, ModelConfig
from pretrain.seeding import torch_stream


class PlainAttention(nn.Module):
    """Self-attention of sequences of one length."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class PlainSwiGlu(nn.Module):
    """Gated linear unit."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def plain_ffn(cfg: ModelConfig) -> nn.Module:
    """The feed-forward layer of a block."""
    dim, hidden = vit_shape(cfg).embed_dim, ffn_hidden_dim(cfg)
    if cfg.ffn_layer == "swiglu":
        return PlainSwiGlu(dim, hidden)
    layers = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, dim)}
    return nn.Sequential(OrderedDict(layers))


class PlainBlock(nn.Module):
    """A transformer block; drop path runs a branch on a subset of the images and adds it back, scaled."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        dim, _, num_heads = vit_shape(cfg)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = PlainAttention(dim, num_heads), plain_ffn(cfg)
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.empty(dim)}) for _ in range(2))

    def attention_branch(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.attn(self.norm1(x)) * self.ls1.gamma

    def ffn_branch(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.mlp(self.norm2(x)) * self.ls2.gamma

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """(B, N, D) to (B, N, D); rows (2, kept): the images that attention and feed-forward run on."""
        if rows is None:
            x = x + self.attention_branch(x)
            return x + self.ffn_branch(x)
        x = add_subset(x, rows[0], self.attention_branch)
        return add_subset(x, rows[1], self.ffn_branch)


def add_subset(x: Tensor, rows: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """A residual branch on some images: (B, N, D) to (B, N, D)."""
    update = branch(x[rows])
    return x.index_add(0, rows, update.to(x.dtype), alpha=len(x) / len(rows))


class PlainViT(nn.Module):
    """A vision transformer without registers, for square images."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        dim, depth, _ = vit_shape(cfg)
        self.cfg, self.side = cfg, cfg.img_size // cfg.patch_size
        patches = nn.Conv2d(cfg.in_channels, dim, kernel_size=cfg.patch_size, stride=cfg.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patches})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.side**2, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, count: int) -> Tensor:
        """Position embeddings (1, 1 + count, D) of a square grid of `count` patches."""
        if count == self.side**2:
            return self.pos_embed
        scale = (count**0.5 + self.cfg.pos_embed_offset) / self.side
        grid = self.pos_embed[:, 1:].float().reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(
        self, images: Tensor, masks: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normed class tokens (B, D) and patch tokens (B, N, D) of images (B, C, S, S)."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(x.shape[1])
        for index, block in enumerate(self.blocks):
            x = block(x, None if rows is None else rows[index])
        x = self.norm(x)
        return x[:, 0], x[:, 1:]


class PlainPrototypes(nn.Module):
    """Weight-normed prototypes."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, b) to (rows, K), with the fused kernel behind `torch.nn.utils.weight_norm`."""
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class PlainHead(nn.Module):
    """The trainable head, in two halves so that the parts of a step can be told apart."""

    def __init__(self, in_dim: int, cfg: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[cfg.hidden_dim] * (cfg.num_layers - 1), cfg.bottleneck_dim]
        layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.GELU())]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = PlainPrototypes(cfg.prototypes, cfg.bottleneck_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) to the bottleneck (rows, b)."""
        return F.normalize(self.mlp(x), dim=-1, eps=1e-12)


class PlainRmlp(nn.Module):
    """The randomized head of one loss in one branch: `draw` before every step."""

    def __init__(self, cfg: Config, loss: str, role: str, device: torch.device) -> None:
        super().__init__()
        dim = vit_shape(cfg.model).embed_dim
        self.widths = [dim, 4 * dim, 4 * dim, 2 * dim // 3, cfg.rmlp.outputs]
        self.seed, self.amplitude = cfg.run.seed, cfg.rmlp.amplitude
        self.stream, self.device = (loss, role), device

    def draw(self, step: int) -> None:
        """The same noise as `RmlpHead` draws."""
        self.weights = []
        for index, (n, m) in enumerate(pairwise(self.widths)):
            generator = torch_stream(self.seed, "rmlp", *self.stream, index, step, device=self.device)
            noise = torch.randn(n, m, generator=generator, device=self.device)
            self.weights.append(torch.eye(n, m, device=self.device) + self.amplitude / m * noise)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) to (rows, 2D//3)."""
        for weight in self.weights[:-1]:
            x = F.gelu(x @ weight)
        return x

    def last_layer(self, x: Tensor) -> Tensor:
        """(rows, 2D//3) to (rows, K)."""
        return x @ self.weights[-1]


class PlainBranch(nn.Module):
    """Backbone and head of the student or the teacher."""

    def __init__(self, cfg: Config, role: str, device: torch.device) -> None:
        super().__init__()
        self.backbone = PlainViT(cfg.model)
        self.random = {}
        if cfg.dino_head.kind == "rmlp":
            self.random = {loss: PlainRmlp(cfg, loss, role, device) for loss in ("dino", "ibot")}
        else:
            self.dino_head = PlainHead(vit_shape(cfg.model).embed_dim, cfg.dino_head)

    def bottleneck(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Both groups of rows through the head but its last layer; the shared head runs once."""
        if self.random:
            return self.random["dino"](cls), self.random["ibot"](patches)
        first, second = self.dino_head(torch.cat([cls, patches])).split([len(cls), len(patches)])
        return first, second

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Both groups of rows through the last layer."""
        if self.random:
            return self.random["dino"].last_layer(cls), self.random["ibot"].last_layer(patches)
        first, second = self.dino_head.last_layer(torch.cat([cls, patches])).split([len(cls), len(patches)])
        return first, second
