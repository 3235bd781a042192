"""One pass over images: each batch through the full model and, with tokens replaced, through it again."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from pretrain.analysis.taps import Look, Place, tapped
from pretrain.config.derived import prefix_tokens
from pretrain.models.block import Block
from pretrain.models.vit import Features, VisionTransformer
from pretrain.registers.attention import AttentionShift
from pretrain.registers.calibration import Calibration
from pretrain.registers.interventions import Intervention, intervened
from pretrain.registers.measures import Oddness, effective_rank, patch_cosines
from pretrain.registers.samples import Batch

FULL = "full"  # name of the model that nothing is done to


@dataclass
class Seen:
    """Of one condition, or of the full model, over the images so far; on the CPU."""

    oddness: Oddness
    cls: list[Tensor] = field(default_factory=list)  # (B, D) after the final norm
    patch_mean: list[Tensor] = field(default_factory=list)  # (B, D)
    cosines: list[Tensor] = field(default_factory=list)  # (n,) of patches with the full model's
    attention: AttentionShift = field(default_factory=AttentionShift)

    def pooled(self) -> dict[str, Tensor]:
        """Features (n, D) fp32 by their name in tables."""
        return {"cls": torch.cat(self.cls), "patch_mean": torch.cat(self.patch_mean)}


@dataclass
class Looked:
    """What a pass has seen."""

    seen: dict[str, Seen]  # by condition, the full model first
    labels: list[int | None] = field(default_factory=list)
    ranks: list[Tensor] = field(default_factory=list)  # (B,) effective rank of the full model's patches
    images: int = 0


def look(
    backbone: VisionTransformer,
    batches: Iterable[Batch],
    interventions: Mapping[str, Intervention],
    calibration: Calibration,
    attention_images: int,
    advance: Callable[[int], None] = lambda _: None,
    measured: bool = True,
) -> Looked:
    """Look at images under all conditions.

    Args:
        backbone: on any device.
        batches: of the images.
        interventions: by condition.
        calibration: of the same model.
        attention_images: attention is compared on so many of the images, the first ones.
        advance: told of images.
        measured: else pooled features alone are kept, as fits images for probes.
    """
    names = [FULL, *interventions]
    whole = Looked({name: Seen(Oddness(calibration)) for name in names})
    for batch in batches:
        if measured:
            compared = min(len(batch.keys), max(0, attention_images - whole.images))
            _look(backbone, batch, interventions, whole, compared)
        else:
            for name, intervention in {FULL: None, **interventions}.items():
                _pool(whole.seen[name], features(backbone, batch.pixels, batch.keys, intervention)[0])
        whole.labels += batch.labels
        whole.images += len(batch.keys)
        advance(len(batch.keys))
    return whole


@torch.no_grad()
def _look(
    backbone: VisionTransformer,
    batch: Batch,
    interventions: Mapping[str, Intervention],
    whole: Looked,
    compared: int,
) -> None:
    """One batch; attention of its first `compared` images."""
    pixels, patches = on_device(backbone, batch.pixels)
    prefix, normed = prefix_tokens(backbone.cfg), dict[int, Tensor]()
    with tapped(backbone, len(pixels), _keeping(backbone, normed, compared)):
        full = backbone([pixels])[0]
    _pool(whole.seen[FULL], full)
    whole.ranks.append(effective_rank(full.patches))
    for name, intervention in interventions.items():
        seen = whole.seen[name]
        with ExitStack() as hooks:
            watch = seen.oddness.add
            places = hooks.enter_context(intervened(backbone, batch.keys, patches, intervention, watch))
            looks = _comparing(backbone, normed, seen.attention, places, compared)
            hooks.enter_context(tapped(backbone, len(pixels), looks))
            ablated = backbone([pixels])[0]
        _pool(seen, ablated)
        seen.attention.images += compared
        seen.cosines.append(patch_cosines(full.patches, ablated.patches, places, prefix))


@torch.no_grad()
def features(
    backbone: VisionTransformer, pixels: Tensor, keys: list[str], intervention: Intervention | None
) -> tuple[Features, Tensor]:
    """Normed features of images (B, C, S, S), and the positions (B, S') replaced; None replaces none."""
    pixels, patches = on_device(backbone, pixels)
    with intervened(backbone, keys, patches, intervention) as places:
        return backbone([pixels])[0], places


def on_device(backbone: VisionTransformer, pixels: Tensor) -> tuple[Tensor, int]:
    """Images where the backbone is, and the number of patches of each."""
    rows, cols = (side // backbone.patch_size for side in pixels.shape[-2:])
    return pixels.to(backbone.cls_token.device), rows * cols


def _pool(seen: Seen, found: Features) -> None:
    seen.cls.append(found.cls.to("cpu", torch.float32, copy=True))  # a view would keep all tokens
    seen.patch_mean.append(found.patches.float().mean(dim=1).cpu())


def _keeping(backbone: VisionTransformer, normed: dict[int, Tensor], compared: int) -> dict[Place, Look]:
    """Looks that keep what attention of each block sees of the first images."""

    def keep(block: int) -> Look:
        return lambda tokens: normed.update({block: tokens[:compared]})

    return {Place(block, "LN1"): keep(block) for block in range(len(backbone.blocks))} if compared else {}


def _comparing(
    backbone: VisionTransformer,
    normed: Mapping[int, Tensor],
    shift: AttentionShift,
    places: Tensor,
    compared: int,
) -> dict[Place, Look]:
    """Looks that compare attention of the first images with what was kept."""
    prefix, looks = prefix_tokens(backbone.cfg), dict[Place, Look]()
    for block, full in normed.items():
        attention = cast(Block, backbone.blocks[block]).attn
        looks[Place(block, "LN1")] = shift.look(block, attention, full, places[:compared], prefix)
    return looks
