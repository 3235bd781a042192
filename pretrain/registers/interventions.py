"""Tokens replaced after blocks, by forward hooks: "Zero-Ablation Overstates Register Content Dependence in
DINO Vision Transformers" (arXiv 2604.14433).

All other tokens are computed as always; without hooks the forward is the model's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.config.derived import prefix_tokens
from pretrain.errors import InputError
from pretrain.models.vit import VisionTransformer
from pretrain.registers.calibration import Calibration
from pretrain.registers.conditions import BANK_PATCHES, Condition, slots
from pretrain.registers.draws import Permutation, choices, derangement, normals

Watch = Callable[[int, Tensor, Tensor], None]  # block, positions (B, S), replacements (B, S, D)


@dataclass(frozen=True)
class Intervention:
    """A condition, and what it draws from."""

    condition: Condition
    blocks: Sequence[int]  # after which tokens are replaced
    calibration: Calibration
    seed: int = 0
    permutation: Permutation = derangement  # of the images of a batch, for `shuffle`


def parse_blocks(text: str, depth: int) -> range:
    """Blocks of `all`, of a range such as `3-8` with both ends, or of one number.

    Raises:
        InputError: it is none of these, or the model has no such block.
    """
    first, dash, last = text.partition("-")
    if text == "all":
        return range(depth)
    if not first.isdecimal() or not (last.isdecimal() if dash else True):
        raise InputError(f"--blocks: {text!r} is neither all, nor a number, nor a range such as 3-8")
    found = range(int(first), int(last if dash else first) + 1)
    if not found or found[-1] >= depth:
        raise InputError(f"--blocks: {text}: the model has blocks 0 to {depth - 1}, in rising order")
    return found


@contextmanager
def intervened(
    backbone: VisionTransformer,
    keys: Sequence[str],
    patches: int,
    intervention: Intervention | None,
    watch: Watch = lambda _block, _slots, _values: None,
) -> Iterator[Tensor]:
    """While it lasts, forwards of these images have tokens replaced; None replaces none and adds no hook.

    Args:
        backbone: its blocks get hooks.
        keys: of the B images of a forward, in its order.
        patches: N of an image.
        intervention: on the same model as its calibration.
        watch: told of all that is put in.

    Yields:
        The positions that are replaced, (B, S) int64 on the CPU.

    Raises:
        InputError: `shuffle` of one image.
    """
    if intervention is None:
        yield torch.empty(len(keys), 0, dtype=torch.int64)
        return
    tokens = intervention.condition.tokens
    places = slots(tokens, keys, prefix_tokens(backbone.cfg) - 1, patches, intervention.seed)
    with ExitStack() as hooks:
        for block in intervention.blocks:
            hook = _hook(block, intervention, keys, places, watch)
            hooks.callback(backbone.blocks[block].register_forward_hook(hook).remove)
        yield places


def _hook(
    block: int, intervention: Intervention, keys: Sequence[str], places: Tensor, watch: Watch
) -> Callable[[nn.Module, tuple[object, ...], Tensor], Tensor]:
    def replace(_module: nn.Module, _inputs: tuple[object, ...], output: Tensor) -> Tensor:
        tokens = output.unflatten(0, (len(keys), -1))
        rows, at = torch.arange(len(keys), device=output.device)[:, None], places.to(output.device)
        values = replacement(intervention, block, tokens[rows, at], keys, places)
        watch(block, places, values)
        return tokens.index_put((rows, at), values.to(tokens.dtype)).flatten(0, 1)  # a new tensor

    return replace


def replacement(
    intervention: Intervention,
    block: int,
    own: Tensor,
    keys: Sequence[str],
    places: Tensor,
) -> Tensor:
    """What takes the place of tokens after a block, (B, S, D).

    Args:
        intervention: the condition and its seed.
        block: index.
        own: (B, S, D) the tokens that are replaced.
        keys: of the B images.
        places: (B, S) int64 positions, on the CPU.
    """
    known, seed = intervention.calibration, intervention.seed
    match intervention.condition.mode:
        case "zero":
            return torch.zeros_like(own)
        case "mean":
            return known.mean[block, places].to(own)
        case "noise":
            drawn = normals(seed, "noise", keys, block, places, own.shape[-1])
            return (known.mean[block, places] + known.var[block, places].sqrt() * drawn).to(own)
        case "shuffle":
            return own[intervention.permutation(seed, block, keys).to(own.device)]
        case "bank":
            chosen = choices(seed, keys, block, len(known.bank))
            return _banked(intervention, block, chosen, places).to(own)
        case "random":
            drawn = normals(seed, "random", keys, block, places, own.shape[-1]).to(own)
            return drawn * (own.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


def _banked(intervention: Intervention, block: int, chosen: Tensor, places: Tensor) -> Tensor:
    """Tokens of the chosen calibration images, (B, S, D): patches are any patches of theirs."""
    bank, tokens = intervention.calibration.bank, intervention.condition.tokens
    prefix = bank.shape[2] - BANK_PATCHES
    at = places
    if tokens.kind == "patch":
        at = torch.arange(prefix, prefix + tokens.number).expand_as(places)
    return bank[chosen[:, None], block, at]
