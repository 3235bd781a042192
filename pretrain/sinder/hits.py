"""Where each image of a batch first shows defects, and the loss that repairs it there."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.derived import prefix_tokens
from pretrain.models.packing import Layout
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.detection import ANGLE_THRESHOLD, alignment, defective_by_angle
from pretrain.sinder.smooth_loss import smooth_loss


@dataclass(frozen=True)
class Criterion:
    """When an image counts as defective; the released code's values."""

    threshold: float = ANGLE_THRESHOLD  # standard deviations
    kernel: int = 3  # side of the smoothing window; its half at the border never counts
    least: int = 3  # defective patches that make an image defective
    limit_layers: int = 10  # blocks that a defect may change: the one that shows it and those before
    first_block: int = 0  # before it, what stands out is no defect: the criterion is relative


class Pass(NamedTuple):
    """Tokens (m, T, D) of images through one block, with a graph of its own: `before` is a leaf."""

    before: Tensor
    after: Tensor


class Hit(NamedTuple):
    """Images that show defects first after the same block."""

    block: int
    first: int  # block from which gradients flow
    images: Tensor  # (n,) int64 rows of the batch
    tokens: Tensor  # (n, T, D) before block `first`
    defective: int  # patches in all
    passes: Sequence[Pass]  # of the search, from `first` to `block`; empty where it is cheaper to run again
    rows: Tensor  # (m,) bool, which images of the passes these are


def patch_grid(backbone: VisionTransformer, tokens: Tensor, images: Tensor) -> Tensor:
    """The patch tokens of (B, T, D) as (B, h, w, D)."""
    rows, cols = (side // backbone.patch_size for side in images.shape[-2:])
    return tokens[:, prefix_tokens(backbone.cfg) :].unflatten(1, (rows, cols))


def run_block(backbone: VisionTransformer, index: int, tokens: Tensor) -> Tensor:
    """(B, T, D) through one block."""
    batch, length, _ = tokens.shape
    flat = backbone.blocks[index](tokens.flatten(0, 1), Layout((batch,), (length,)))
    whole: Tensor = flat.unflatten(0, (batch, length))
    return whole


@torch.no_grad()
def find_hits(
    backbone: VisionTransformer, images: Tensor, directions: Sequence[Tensor], criterion: Criterion
) -> list[Hit]:
    """The forward stops for each image at the first block with enough defective patches (paper, section 3.3).

    Each image's stream starts anew `limit_layers` blocks before its own hit: only there gradients may flow.
    So every block that a gradient may reach is recorded by itself, and the last `limit_layers` are kept.

    Args:
        backbone: under repair.
        images: (B, C, S, S').
        directions: (D,) for each block.
        criterion: what counts as defective.

    Returns:
        By rising block; empty where no image is defective.
    """
    tokens, rows = backbone.embed(images), torch.arange(len(images), device=images.device)
    start = max(criterion.first_block - criterion.limit_layers + 1, 0)  # no gradient goes further back
    before: list[Tensor] = []  # inputs of the last blocks, of the images that go on
    passes: list[Pass] = []  # through them, since an image last dropped out
    hits = []
    for index, direction in enumerate(directions):
        before = [*before, tokens.requires_grad_(index > start)][-criterion.limit_layers :]
        with torch.set_grad_enabled(index >= start):
            after = run_block(backbone, index, tokens)
        passes = [*passes, Pass(tokens, after)][-criterion.limit_layers :]
        tokens = after.detach()
        counts = _defective(backbone, tokens, images, direction, criterion)[1].sum(dim=(1, 2))
        found = (counts >= criterion.least) & (index >= criterion.first_block)
        if number := int(found.sum()):
            # a backward takes two forwards: it may go through a third of other images for their sake
            whole = len(passes) == len(before) and 3 * number >= 2 * len(found)
            first, defective = index - len(before) + 1, int(counts[found].sum())
            kept = passes if whole else []
            hits.append(Hit(index, first, rows[found], before[0][found], defective, kept, found))
            tokens, rows, passes = tokens[~found], rows[~found], []
            before = [earlier[~found] for earlier in before]
        if not len(rows):
            break
    return hits


def hit_backward(
    backbone: VisionTransformer,
    images: Tensor,
    hit: Hit,
    directions: Sequence[Tensor],
    criterion: Criterion,
    number: int,
) -> float:
    """Add the gradients of a hit to the blocks from `first` to `block`.

    Args:
        backbone: under repair.
        images: (B, C, S, S') of the batch.
        hit: of the batch; its passes are used up.
        directions: (D,) for each block.
        criterion: that found it.
        number: of images in all hits.

    Returns:
        The sum of its images' smooth losses over `number`.
    """
    tokens = hit.passes[-1].after[hit.rows] if hit.passes else _run_again(backbone, hit)
    cosines, defective = _defective(backbone, tokens.detach(), images, directions[hit.block], criterion)
    patches = patch_grid(backbone, tokens, images).float()
    loss = smooth_loss(patches, cosines, defective, criterion.kernel).sum() / number
    loss.backward()
    for later, earlier in pairwise(reversed(hit.passes)):
        earlier.after.backward(later.before.grad)
    return loss.item()


def _run_again(backbone: VisionTransformer, hit: Hit) -> Tensor:
    """(n, T, D) after the hit's block."""
    tokens = hit.tokens
    for index in range(hit.first, hit.block + 1):
        tokens = run_block(backbone, index, tokens)
    return tokens


def _defective(
    backbone: VisionTransformer, tokens: Tensor, images: Tensor, direction: Tensor, criterion: Criterion
) -> tuple[Tensor, Tensor]:
    """|cos| to the direction and the patches that count as defective, both (B, h, w)."""
    cosines = alignment(patch_grid(backbone, tokens, images).float(), direction)
    return cosines, defective_by_angle(cosines, criterion.threshold, criterion.kernel // 2)
