"""The vision transformer of DINOv2: learned positions, optional registers, one pass over all crop groups.

Parameter names and shapes are those of the released checkpoints (`blocks.3.attn.qkv.weight`, mask_token (1,
D)).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pretrain.config.derived import drop_path_rates, ffn_hidden_dim, position_grid, prefix_tokens, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.models.attention import Backend
from pretrain.models.block import Block
from pretrain.models.packing import Layout, Subset, drop_path_subsets, pack, unpack, used_tokens
from pretrain.models.pos_embed import interpolate_pos_embed
from pretrain.models.register_neurons import neurons_of


class Features(NamedTuple):
    """Output tokens of one group of images, after the final norm."""

    cls: Tensor  # (B, D)
    registers: Tensor  # (B, R, D), the test-time register last
    patches: Tensor  # (B, N, D), or (M, D) where only some were asked for


class PatchProjection(nn.Conv2d):
    """A convolution whose windows do not overlap is a linear layer on them, which CPUs do faster."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S') to (B, N, D), row by row; what is left over at the edges is cut off."""
        size = self.kernel_size[0]
        rows, columns = (pixels // size for pixels in images.shape[-2:])
        x = images[..., : rows * size, : columns * size].unflatten(-1, (columns, size))
        x = x.unflatten(-3, (rows, size)).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, size, size)
        return linear(x.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S') to (B, N, D), row by row."""
        return self.proj(images)


class VisionTransformer(nn.Module):
    """A ViT over several groups of images, one per crop size; each block runs once over all their tokens."""

    def __init__(self, cfg: ModelConfig, backend: Backend = "sdpa") -> None:
        super().__init__()
        dim, depth, num_heads = vit_shape(cfg)
        self.cfg, self.backend = cfg, backend
        self.embed_dim = dim
        self.patch_size = cfg.patch_size
        self.drop_path_rates = drop_path_rates(cfg)
        self.patch_embed = PatchEmbed(cfg.in_channels, dim, cfg.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(position_grid(cfg)), dim))
        if cfg.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, cfg.num_register_tokens, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        kind, hidden, prefix = cfg.ffn_layer, ffn_hidden_dim(cfg), prefix_tokens(cfg)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, kind, hidden, cfg.layer_scale, backend, prefix, neurons_of(cfg, index))
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens before the first block.

        Args:
            images: (B, C, S, S') float.
            masks: (B, N) bool; hidden patches become the mask token before positions are added.

        Returns:
            (B, 1 + R + N, D): class token, registers (without position), patches. The last register is one
            of zeros where there are `model.register_neurons`.
        """
        x = self.patch_embed(images)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(images.shape[-2], images.shape[-1])
        registers = []
        if self.cfg.num_register_tokens:
            registers.append(self.register_tokens.expand(len(x), -1, -1))
        if self.cfg.register_neurons:
            registers.append(x.new_zeros(len(x), 1, self.embed_dim))
        return torch.cat([x[:, :1], *registers, x[:, 1:]], dim=1) if registers else x

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings (1, 1 + N, D) for images of a size in pixels.

        A square grid is used as it is for square images only, as in the original: an image a few pixels off
        square is interpolated to the grid it has.
        """
        stored, grid = position_grid(self.cfg), (height // self.patch_size, width // self.patch_size)
        if grid == stored and (height == width or stored[0] != stored[1]):
            return self.pos_embed
        offset, antialias = self.cfg.pos_embed_offset, self.cfg.pos_embed_antialias
        return interpolate_pos_embed(self.pos_embed, stored, grid, offset, antialias)

    def forward(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        drop_rows: Sequence[Tensor] | None = None,
        num_shares: int = 1,
        patches: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        """Normed features of each group of images.

        Args:
            images: groups of equally large images, each (B_i, C, S_i, S_i').
            masks: one (B_i, N_i) bool or None per group.
            drop_rows: one (depth, 2, kept) per group, see `drop_path_subsets`; None runs every branch on all
                images.
            num_shares: independent draws that `drop_rows` concatenates.
            patches: one (M_i,) int64 per group, into its B_i * N_i patches: all that is asked for besides the
                class tokens. The last block then works on these tokens alone, and `Features` has no registers
                and (M_i, D) patches.
        """
        masks = masks if masks is not None else [None] * len(images)
        x, layout = pack([self.embed(i, m) for i, m in zip(images, masks, strict=True)])
        subsets: Sequence[tuple[Subset, Subset] | None] = [None] * len(self.blocks)
        if drop_rows is not None:
            subsets = drop_path_subsets(drop_rows, self.drop_path_rates, layout, num_shares)
        used = None if patches is None else used_tokens(layout, patches, prefix_tokens(self.cfg))
        for index, (block, subset) in enumerate(zip(self.blocks, subsets, strict=True)):
            x = block(x, layout, subset, used if index == len(self.blocks) - 1 else None)
        if patches is not None:
            return _used_features(self.norm(x), layout, patches)
        return [self._features(group) for group in unpack(self.norm(x), layout)]

    def intermediate_features(self, images: Tensor, layers: Sequence[int]) -> list[Features]:
        """Normed features after the given blocks (0-based) of one group of images (B, C, S, S')."""
        x, layout = pack([self.embed(images)])
        outputs = {}
        for index, block in enumerate(self.blocks):
            x = block(x, layout)
            if index in layers:
                outputs[index] = self._features(unpack(self.norm(x), layout)[0])
        return [outputs[index] for index in layers]

    def _features(self, tokens: Tensor) -> Features:
        prefix = prefix_tokens(self.cfg)
        return Features(tokens[:, 0], tokens[:, 1:prefix], tokens[:, prefix:])


def _used_features(tokens: Tensor, layout: Layout, patches: Sequence[Tensor]) -> list[Features]:
    """The features of each group from the tokens (U, D) that `used_tokens` lists."""
    parts = tokens.split([*layout.counts, *[len(indices) for indices in patches]])
    groups = len(layout.counts)
    pairs = zip(parts[:groups], parts[groups:], strict=True)
    return [Features(cls, cls.unsqueeze(1)[:, :0], some) for cls, some in pairs]
