"""Attention of a forward with replaced tokens against that of the full one, block by block.

Within a block images are taken one at a time: no more than two matrices (H, T, T) are held.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.special import entr

from pretrain.models.attention import Attention


def attention_rows(attention: Attention, tokens: Tensor) -> Tensor:
    """What each query attends to, (n, T, D) normed tokens to (n, H, T, T) fp32; rows sum to 1."""
    qkv: Tensor = attention.qkv(tokens)
    query, keys = qkv.float().unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)[:2]
    return torch.softmax(query @ keys.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Divergence of distributions in the last dimension, (..., T) to (...), in nats: 0 to ln 2.

    The entropy of their mean minus the mean of their entropies; exactly 0 where they are the same.
    """
    apart = entr((p + q) / 2).sum(-1) - (entr(p).sum(-1) + entr(q).sum(-1)) / 2
    return apart.clamp(min=0)


@dataclass
class AttentionShift:
    """Sums over images, for each of L blocks; fp64."""

    images: int = 0
    divergence: dict[int, float] = field(default_factory=dict)  # mean over heads and queries
    cls_full: dict[int, float] = field(default_factory=dict)  # of the class token's attention on the set
    cls_ablated: dict[int, float] = field(default_factory=dict)
    patch_full: dict[int, float] = field(default_factory=dict)  # of the patches', mean over them
    patch_ablated: dict[int, float] = field(default_factory=dict)

    def look(
        self, block: int, attention: Attention, full: Tensor, places: Tensor, prefix: int
    ) -> Callable[[Tensor], None]:
        """What compares a block's attention on tokens (B, T, D), when it is told of them.

        Args:
            block: index.
            attention: of the block.
            full: (B, T, D) what it saw in the full forward.
            places: (B, S) positions of the set.
            prefix: tokens before the patches.
        """

        def compare(ablated: Tensor) -> None:
            for image, (before, after) in enumerate(zip(full, ablated, strict=False)):  # the first ones
                p, q = (attention_rows(attention, tokens[None])[0] for tokens in (before, after))
                self._add(self.divergence, block, jensen_shannon(p, q).mean())
                at = places[image].to(p.device)
                for rows, on_cls, on_patch in (
                    (p, self.cls_full, self.patch_full),
                    (q, self.cls_ablated, self.patch_ablated),
                ):
                    mass = rows[..., at].sum(-1)  # (H, T)
                    self._add(on_cls, block, mass[:, 0].mean())
                    self._add(on_patch, block, mass[:, prefix:].mean())

        return compare

    @staticmethod
    def _add(sums: dict[int, float], block: int, value: Tensor) -> None:
        sums[block] = sums.get(block, 0.0) + float(value)

    def means(self) -> dict[str, list[float]]:
        """Each figure by block, mean over the images."""
        names = ("divergence", "cls_full", "cls_ablated", "patch_full", "patch_ablated")
        return {
            name: [value / self.images for _, value in sorted(getattr(self, name).items())] for name in names
        }
