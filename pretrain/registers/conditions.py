"""Which tokens are replaced, and by what: the conditions of an experiment, and their places in the tokens."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pretrain.errors import InputError
from pretrain.seeding import numpy_stream

Kind = Literal["registers", "cls", "reg", "patch"]
Mode = Literal["zero", "mean", "noise", "shuffle", "bank", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)
BANK_PATCHES = 4  # a calibration keeps so many of each image of its bank; the paper's control replaces 4
KNOWN = "registers, cls, reg:I or patch:K, then :" + " or :".join(MODES)
DEFAULT = (
    *(f"registers:{mode}" for mode in MODES),
    *("cls:zero", "cls:mean", "cls:bank", "patch:4:zero", "patch:4:mean"),
)


class TokenSet(NamedTuple):
    """Tokens that are replaced together."""

    kind: Kind
    number: int = 0  # reg: which one, from 1; patch: how many of each image

    def __str__(self) -> str:
        """As on the command line."""
        return f"{self.kind}:{self.number}" if self.kind in ("reg", "patch") else self.kind


class Condition(NamedTuple):
    """What replaces which tokens."""

    tokens: TokenSet
    mode: Mode

    def __str__(self) -> str:
        """As on the command line."""
        return f"{self.tokens}:{self.mode}"


def parse_condition(text: str) -> Condition:
    """A condition such as `registers:zero`, `reg:2:mean` or `patch:4:zero`.

    Raises:
        InputError: it is none.
    """
    for mode in MODES:
        match text.split(":"):
            case ["registers" | "cls" as kind, name] if name == mode:
                return Condition(TokenSet(kind), mode)
            case ["reg" | "patch" as kind, number, name] if name == mode and number.isdecimal():
                if int(number):
                    return Condition(TokenSet(kind, int(number)), mode)
    raise InputError(f"--conditions: {text!r} is none; {KNOWN}")


def fitting(conditions: Sequence[Condition], registers: int, patches: int) -> list[Condition]:
    """Those that a model can have: without registers none on them, which the caller says.

    Args:
        conditions: without repetition.
        registers: R of the model.
        patches: N of its images.

    Raises:
        InputError: a register or so many patches do not exist, or not in the bank; or no condition is left.
    """
    for tokens, mode in conditions:
        if tokens.kind == "reg" and 0 < registers < tokens.number:
            raise InputError(f"--conditions: {tokens}: the model has registers 1 to {registers}")
        if tokens.kind == "patch" and tokens.number >= patches:
            raise InputError(f"--conditions: {tokens}: an image has {patches} patches, one must stay")
        if tokens.kind == "patch" and mode == "bank" and tokens.number > BANK_PATCHES:
            raise InputError(
                f"--conditions: {tokens}:bank: calibration keeps {BANK_PATCHES} patches an image"
            )
    kept = [c for c in conditions if registers or c.tokens.kind not in ("registers", "reg")]
    if not kept:
        raise InputError("--conditions: the model has no registers; name some on cls or patch:K")
    return kept


def slots(tokens: TokenSet, keys: Sequence[str], registers: int, patches: int, seed: int) -> Tensor:
    """Positions of a set among the tokens of each image, (B, S) int64; random patches depend on the image.

    Args:
        tokens: the set.
        keys: of B images.
        registers: R; tokens are the class token, R registers, N patches.
        patches: N.
        seed: of the choice of patches.
    """
    match tokens.kind:
        case "cls":
            own = [0]
        case "registers":
            own = list(range(1, 1 + registers))
        case "reg":
            own = [tokens.number]
        case "patch":
            return torch.stack([random_patches(key, tokens.number, registers, patches, seed) for key in keys])
    return torch.tensor(own).expand(len(keys), -1)


def random_patches(key: str, number: int, registers: int, patches: int, seed: int) -> Tensor:
    """Positions of some patches of an image, (number,) int64; of more patches the first ones are the same."""
    order = numpy_stream(seed, "registers", "patches", key).permutation(patches)
    return torch.from_numpy(order[:number]) + 1 + registers
