"""Maps of an image's patches: main components of their tokens as colours, and where the class token looks.

Shapes are those of `pretrain.batch`; n images, h x w = N patches.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.config.derived import prefix_tokens
from pretrain.errors import InputError
from pretrain.models.attention import Attention
from pretrain.models.block import Block
from pretrain.models.packing import Layout
from pretrain.models.vit import VisionTransformer
from pretrain.run.durable import publish
from pretrain.run.safetensors_file import write_safetensors

OUTLIERS = 0.02  # share of the tokens at either end of a component that get its darkest and brightest value


@dataclass(frozen=True)
class PatchPca:
    """Three directions in token space and the range of each: one basis, so that pictures can be compared."""

    mean: Tensor  # (D,)
    basis: Tensor  # (D, 3) orthonormal
    low: Tensor  # (3,) the component's value that is shown as 0
    high: Tensor  # (3,) as 1

    @classmethod
    def fit(cls, tokens: Tensor) -> Self:
        """The main components of all patch tokens (n, N, D); the largest weight of each is positive.

        Raises:
            InputError: fewer than three directions, or tokens that are not finite.
        """
        rows = tokens.detach().flatten(0, 1).double().cpu()
        if min(rows.shape) < 3 or not rows.isfinite().all():
            raise InputError(
                f"a picture of patch tokens needs three or more finite ones, got {tuple(rows.shape)}"
            )
        mean = rows.mean(0)
        _, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean))
        basis = vectors[:, -3:].flip(1)
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        ends = torch.tensor([OUTLIERS, 1 - OUTLIERS], dtype=torch.float64)
        low, high = torch.quantile((rows - mean) @ basis, ends, dim=0)
        # The layout decides the order of the sums: contiguous like a loaded one, for the same picture.
        return cls(mean.float(), basis.float().contiguous(), low.float(), high.float())

    def project(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Patch tokens (n, N, D) as colours (n, 3, h, w) from 0 to 1; `grid` is (h, w), else a square."""
        side = math.isqrt(tokens.shape[1])
        values = (tokens.detach().float().cpu() - self.mean) @ self.basis
        colours = ((values - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)
        return colours.transpose(1, 2).reshape(len(tokens), 3, *(grid or (side, side)))

    def explained(self, tokens: Tensor) -> float:
        """Share of the variance of the tokens (n, N, D) that the three directions hold.

        The basis stays while the features move on: near 0 the colours have nothing more to say.
        """
        rows = tokens.detach().flatten(0, 1).float().cpu()
        rows = rows - rows.mean(0)
        return float((rows @ self.basis).square().sum() / rows.square().sum().clamp(min=1e-12))

    def save(self, path: Path) -> None:
        """Write the basis to a .safetensors file, in one step."""
        temporary = path.with_name(path.name + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(temporary, {name: value.contiguous() for name, value in vars(self).items()})
        publish(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, damaged or something else.
        """
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            fault = f"not the basis of a run's pictures ({error})"
            raise InputError(f"{path}: {fault}; without this file the next picture fits a new one") from error


@torch.no_grad()
def cls_attention(model: VisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """What the class token attends to in a block, (n, C, S, S') to (n, H, h, w) shares of attention.

    They sum to less than 1: the class token and the registers have their share too.
    """
    shares: list[Tensor] = []

    def look(attention: Attention, inputs: tuple[Tensor, Layout]) -> None:
        shares.append(_cls_shares(attention, inputs[0].reshape(len(images), -1, model.embed_dim)))

    # Queries and keys are computed a second time within the forward, where every engine has the weights.
    hook = cast(Block, model.blocks[block]).attn.register_forward_pre_hook(look)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not notice the hook
            model([images])
    finally:
        hook.remove()
    prefix = prefix_tokens(model.cfg)
    rows, cols = (side // model.patch_size for side in images.shape[-2:])
    return shares[0][..., prefix:].reshape(len(images), -1, rows, cols)


def _cls_shares(attention: Attention, tokens: Tensor) -> Tensor:
    """The class token's row of the attention matrix, from (n, N', D) to (n, H, N') fp32."""
    qkv: Tensor = attention.qkv(tokens)
    qkv = qkv.float().reshape(*tokens.shape[:2], 3, attention.num_heads, -1)  # (n, N', 3, H, d)
    query, keys = qkv[:, 0, 0], qkv[:, :, 1]
    scores = torch.einsum("nhd,nkhd->nhk", query, keys) * query.shape[-1] ** -0.5
    return torch.softmax(scores, dim=-1)
