"""What tokens are like when nothing is replaced: mean and variance after each block, whole examples.

A file holds them in fp32 (norms of registers leave the range of half precision), with a hash of the weights
and the preprocessing that they belong to.
"""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from pretrain.analysis.images import ImageSet
from pretrain.analysis.taps import Look, Place, tapped
from pretrain.config.derived import prefix_tokens
from pretrain.errors import InputError, first_line
from pretrain.export.own import map_safetensors, write_tensors
from pretrain.models.vit import VisionTransformer
from pretrain.registers.conditions import BANK_PATCHES, random_patches
from pretrain.registers.moments import Moments
from pretrain.registers.samples import Batch

FORMAT = "pretrain-registers-calibration-1"


@dataclass(frozen=True)
class Calibration:
    """Over n images, after each of L blocks; T = 1 + R + N tokens; fp32 on the CPU."""

    mean: Tensor  # (L, T, D)
    var: Tensor  # (L, T, D) divided by n
    bank: Tensor  # (m, L, 1 + R + BANK_PATCHES, D) tokens of m of the images: prefix, then random patches
    keys: tuple[str, ...]  # of the n images
    weights: str  # `model_fingerprint`
    preprocessing: str  # in words

    @property
    def images(self) -> int:
        """The n of mean and variance."""
        return len(self.keys)


def preprocessing(images: ImageSet) -> str:
    """How images become pixels, in words that two calibrations share if and only if they do it alike."""
    scaling = images.scaling
    mean, std = (", ".join(f"{value:g}" for value in v) for v in (scaling.mean, scaling.std))
    window = f", window {scaling.window[0]:g} to {scaling.window[1]:g}" if scaling.window else ""
    return f"shorter side {images.size} px, centre crop, mean {mean}, deviation {std}{window}"


@torch.no_grad()
def calibrate(
    backbone: VisionTransformer,
    batches: Iterable[Batch],
    weights: str,
    words: str,
    bank_images: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Look at images, nothing replaced.

    Args:
        backbone: on any device.
        batches: of the calibration images.
        weights: `model_fingerprint`.
        words: `preprocessing`.
        bank_images: whole examples kept, the first ones.
        seed: of the patches kept.
        advance: told of images.

    Raises:
        InputError: there is no image.
    """
    moments = [Moments() for _ in backbone.blocks]
    examples: list[Tensor] = []
    keys: list[str] = []
    for batch in batches:
        wanted = batch.keys[: max(0, bank_images - len(keys))]
        looks, kept = _looks(backbone, moments, wanted, seed)
        with tapped(backbone, len(batch.keys), looks):
            backbone([batch.pixels.to(backbone.cls_token.device)])
        examples += [torch.stack(kept, dim=1)] if wanted else []
        keys += batch.keys
        advance(len(batch.keys))
    if not keys:
        raise InputError("--calibration-images: none is left that is not evaluated too")
    mean, var = (torch.stack([getattr(m, name) for m in moments]) for name in ("mean", "variance"))
    mean, var = mean.float().cpu(), var.float().cpu()
    return Calibration(mean, var, torch.cat(examples), tuple(keys), weights, words)


def _looks(
    backbone: VisionTransformer, moments: list[Moments], wanted: list[str], seed: int
) -> tuple[dict[Place, Look], list[Tensor]]:
    """Looks at all blocks of a batch, and the tokens that they keep of its first images."""
    registers = prefix_tokens(backbone.cfg) - 1
    kept: list[Tensor] = []  # of each block (wanted, 1 + R + BANK_PATCHES, D)

    def look_at(own: Moments) -> Look:
        def look(tokens: Tensor) -> None:
            own.add(tokens)
            if wanted:
                rows, places = torch.arange(len(wanted))[:, None], _examples(wanted, tokens, registers, seed)
                kept.append(tokens[rows.to(tokens.device), places.to(tokens.device)].float().cpu())

        return look

    return {Place(block, "RC2"): look_at(own) for block, own in enumerate(moments)}, kept


def _examples(keys: list[str], tokens: Tensor, registers: int, seed: int) -> Tensor:
    """Positions (b, 1 + R + BANK_PATCHES) that the bank keeps; few patches are kept several times."""
    prefix, patches = 1 + registers, tokens.shape[1] - 1 - registers
    drawn = torch.stack([random_patches(key, BANK_PATCHES, registers, patches, seed) for key in keys])
    chosen = drawn[:, torch.arange(BANK_PATCHES) % drawn.shape[1]]
    return torch.cat([torch.arange(prefix).expand(len(keys), -1), chosen], dim=1)


def save(path: Path, calibration: Calibration) -> None:
    """Write a calibration to a .safetensors file.

    Raises:
        InputError: the name is another, or it cannot be written.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"--calibration: {path} must end in .safetensors")
    metadata = {
        "calibration": FORMAT,
        "weights": calibration.weights,
        "preprocessing": calibration.preprocessing,
        "keys": json.dumps(calibration.keys),
    }
    tensors = {name: getattr(calibration, name) for name in ("mean", "var", "bank")}
    write_tensors(path, tensors, metadata)


def load(path: Path, weights: str, words: str, evaluated: Collection[str]) -> Calibration:
    """Read what `save` wrote, for these weights and images.

    Args:
        path: of the file.
        weights: `model_fingerprint` of the model.
        words: `preprocessing` of the images.
        evaluated: keys of images that must not be among the calibration's.

    Raises:
        InputError: it is no calibration, or one of something else, or of images that are evaluated.
    """
    try:
        metadata, tensors = map_safetensors(path)
        if metadata["calibration"] != FORMAT:
            raise ValueError(f"its format is {metadata['calibration']}, this code reads {FORMAT}")
        found = Calibration(
            tensors["mean"],
            tensors["var"],
            tensors["bank"],
            tuple(json.loads(metadata["keys"])),
            metadata["weights"],
            metadata["preprocessing"],
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        fault = f"is no calibration ({first_line(error)})"
        raise InputError(f"{path}: {fault}; name a file that is not there: it is made") from error
    if found.weights != weights:
        raise InputError(f"{path}: was made with another model; name another file for this one")
    if found.preprocessing != words:
        raise InputError(f"{path}: was made with {found.preprocessing}, not {words}; name another file")
    shared = set(found.keys) & set(evaluated)
    if shared:
        fault = f"{len(shared)} of its {found.images} images are evaluated here"
        raise InputError(f"{path}: {fault}; take the --seed and --number it was made with, or another file")
    return found
