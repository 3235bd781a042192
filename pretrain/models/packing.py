"""Sequences of several lengths packed one after another: linears and norms see a single (T, D) tensor.

A layout lists groups of equally long sequences (the global crops, the local crops). Attention works group by
group; drop path picks whole sequences of each group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.derived import kept_rows


class Layout(NamedTuple):
    """Groups of packed sequences: how many, and how many tokens each."""

    counts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each group."""
        return tuple(count * length for count, length in zip(self.counts, self.lengths, strict=True))


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Groups of sequences, each (count, length, D), as one (T, D) tensor and its layout."""
    layout = Layout(tuple(g.shape[0] for g in groups), tuple(g.shape[1] for g in groups))
    return torch.cat([g.flatten(0, 1) for g in groups]), layout


def unpack(x: Tensor, layout: Layout) -> list[Tensor]:
    """The inverse of `pack`: (T, D) to a list of (count, length, D) views."""
    shapes = zip(x.split(layout.tokens), layout.counts, layout.lengths, strict=True)
    return [part.unflatten(0, (count, length)) for part, count, length in shapes]


@dataclass(frozen=True)
class Subset:
    """The sequences whose residual branch runs in one block, for one branch (batch-subset drop path).

    DINOv2 skips whole images instead of multiplying by zero: the branch costs `1 - rate` of its time, and the
    outputs are scaled by count / kept of their group so that the expectation stays.
    """

    tokens: Tensor  # (T',) int64 rows of the packed tensor
    scale: Tensor  # (T', 1) float32
    layout: Layout

    def factors(self, tokens: int) -> Tensor:
        """What the branch of each of all tokens is multiplied by, (tokens, 1): 0 where it does not run."""
        return self.scale.new_zeros(tokens, 1).index_copy(0, self.tokens, self.scale)


def used_tokens(layout: Layout, patches: Sequence[Tensor], prefix: int) -> Tensor:
    """Rows of the packed tensor: all class tokens, group after group, then the given patches of each group.

    Args:
        layout: the packed sequences.
        patches: (M,) int64 per group, into its patches one sequence after another.
        prefix: tokens of a sequence before its patches.
    """
    first, some, offset = [], [], 0
    for count, length, indices in zip(layout.counts, layout.lengths, patches, strict=True):
        first.append(torch.arange(count, device=indices.device) * length + offset)
        sequence = indices.div(length - prefix, rounding_mode="floor")
        some.append(indices + (sequence + 1) * prefix + offset)
        offset += count * length
    return torch.cat([*first, *some])


def _token_rows(rows: Tensor, offset: int, length: int) -> Tensor:
    """Sequence rows (..., kept) to token rows (..., kept * length) of the packed tensor."""
    within = torch.arange(length, device=rows.device)
    return (offset + rows.unsqueeze(-1) * length + within).flatten(-2)


def drop_path_subsets(
    rows: Sequence[Tensor], rates: Sequence[float], layout: Layout, num_shares: int
) -> list[tuple[Subset, Subset]]:
    """For each block the subsets of its attention and feed-forward branch.

    Args:
        rows: for each group of the layout (depth, 2, kept) int64 sequence rows; where rates differ, the first
            rows of a block count and the rest is padding.
        rates: drop-path rate of each block.
        layout: the packed sequences.
        num_shares: independent draws that `rows` concatenates (images groups of the micro-batch).
    """
    offsets = (0, *layout.tokens[:-1])
    tokens = [_token_rows(r, o, n) for r, o, n in zip(rows, offsets, layout.lengths, strict=True)]
    subsets = []
    for block, rate in enumerate(rates):
        kept = [num_shares * kept_rows(rate, count // num_shares) for count in layout.counts]
        sizes = [k * n for k, n in zip(kept, layout.lengths, strict=True)]
        scale = torch.cat(
            [
                torch.full((size, 1), count / k, device=rows[0].device)
                for size, count, k in zip(sizes, layout.counts, kept, strict=True)
            ]
        )
        kept_layout = Layout(tuple(kept), layout.lengths)
        attention, ffn = (
            torch.cat([t[block, branch, :size] for t, size in zip(tokens, sizes, strict=True)])
            for branch in (0, 1)
        )
        subsets.append((Subset(attention, scale, kept_layout), Subset(ffn, scale, kept_layout)))
    return subsets
