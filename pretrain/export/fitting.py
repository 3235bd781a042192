"""A backbone from a file of any format, fitted to the model section of a run: what `model.init_from` takes.

Only the position grid is changed, by the model's own interpolation, which leaves features as they are.
Everything else must agree: a difference is refused, with the setting or the command that mends it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from pretrain.config.derived import ffn_hidden_dim, position_grid, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export.weights import Weights, read_weights
from pretrain.surgery.architecture import check_complete, shapes
from pretrain.surgery.conversion import target_interpolation
from pretrain.surgery.resize import resize_positions

SHOWN = 3  # differences in an error line
SURGERY = "python tools/surgery.py"


@dataclass(frozen=True)
class Fitted:
    """A backbone that fits a run's model, and what was made of its file."""

    state: dict[str, Tensor]  # every tensor of the model, in the file's dtypes; positions in fp32
    report: list[str]  # lines


@dataclass(frozen=True)
class Mismatch:
    """One way in which two model sections are not of the same backbone."""

    text: str  # key, here and there
    setting: str  # that makes the run's model the file's
    verb: str = ""  # of tools/surgery.py that makes the file's model the run's


def fitted_backbone(path: Path, model: ModelConfig) -> Fitted:
    """The backbone in a file or folder of any known format, with a run's position grid.

    Args:
        path: as for `read_weights`; of a training checkpoint the teacher's.
        model: of the run.

    Raises:
        InputError: the file cannot be read, or its backbone is not the model's in all but the grid.
    """
    weights = _read(path)
    fault = _lost(weights) or _difference(weights, model)
    if fault:
        raise InputError(f"model.init_from: {_title(weights)} {fault}")
    return _fit(weights, model)


def _read(path: Path) -> Weights:
    try:
        return read_weights(path)
    except InputError as error:
        options = f"; {SURGERY} convert has such options" if " --" in str(error) else ""
        raise InputError(f"model.init_from: {error}{options}") from error


def _fit(weights: Weights, model: ModelConfig) -> Fitted:
    rows, columns = position_grid(model)
    full = {**weights.state, "pos_embed": weights.state["pos_embed"].float()}
    settled = _with_interpolation(weights.model, model)
    state, _ = resize_positions(full, settled, (rows * model.patch_size, columns * model.patch_size))
    check_complete(state, model)
    return Fitted(state, _report(weights, model))


def _report(weights: Weights, model: ModelConfig) -> list[str]:
    added = sum(change.kind == "added" for change in weights.changes)
    before, after = (" x ".join(map(str, position_grid(m))) for m in (weights.model, model))
    resized = f"positions {before}" + ("" if before == after else f" -> {after}")
    wanted = len(shapes(model))
    offset, antialias = _words(_interpolation(model))
    head = f"{_title(weights)}: {wanted - added} of {wanted} tensors; {resized}"
    head += f" (offset {offset}, antialias {antialias})"
    changes = [f"{change.kind}: {change.what} ({change.why})" for change in weights.changes]
    return [f"model.init_from: {line}" for line in (head, *changes)]


def _title(weights: Weights) -> str:
    return f"{weights.path} ({weights.kind}, {weights.layout})"


def _lost(weights: Weights) -> str:
    """Tensors of no known place could belong to another computation, such as norms of queries and keys."""
    lost = [f"{change.what} ({change.why})" for change in weights.changes if change.kind == "lost"]
    if not lost:
        return ""
    without = f"{SURGERY} convert {weights.path} --to ours --allow-loss --out NEW.safetensors"
    return f"also holds {lost[0]}; if they change nothing, make a file without them: {without}"


def _difference(weights: Weights, model: ModelConfig) -> str:
    """What is wrong with the model in a file, and what mends it; nothing where only the grid differs."""
    if weights.model.register_neurons:
        return "has a test-time register, which training does not; take the file it was made from"
    found = [*_differences(model, weights.model), *_other_interpolation(weights, model)]
    if not found:
        return ""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    texts = ", ".join(difference.text for difference in found[:SHOWN])
    fix = f"set {' '.join(dict.fromkeys(difference.setting for difference in found))}"
    if len(found) == 1 and found[0].verb:
        verb, _, arguments = found[0].verb.partition(" ")
        command = f"{SURGERY} {verb} {weights.path} {arguments} --out NEW.safetensors"
        fix += f", or make a file that fits: {command}"
    return f"holds another model: {texts}{more}; {fix}"


def _differences(here: ModelConfig, there: ModelConfig) -> Iterator[Mismatch]:
    """What makes other tensors, or another function of the same ones; the position grid does not count."""
    mine, theirs = vit_shape(here)._asdict(), vit_shape(there)._asdict()
    for key in mine:
        if mine[key] != theirs[key]:
            yield Mismatch(_text(key, mine[key], theirs[key]), _shape_setting(key, here, there))
    for key in ("patch_size", "in_channels", "num_register_tokens", "ffn_layer"):
        old, new = getattr(here, key), getattr(there, key)
        if old != new:
            yield Mismatch(_text(key, old, new), f"model.{key}={new}", _verb(key, old, new))
    alike = (here.ffn_layer, mine["embed_dim"]) == (there.ffn_layer, theirs["embed_dim"])
    if alike and ffn_hidden_dim(here) != ffn_hidden_dim(there):
        text = _text("ffn_ratio", f"{here.ffn_ratio:g}", f"{there.ffn_ratio:g}")
        yield Mismatch(text, f"model.ffn_ratio={there.ffn_ratio:g}")
    if (here.layer_scale is None) != (there.layer_scale is None):
        value = "null" if there.layer_scale is None else "1.0"
        old, new = ("null", "not null") if here.layer_scale is None else (f"{here.layer_scale:g}", "null")
        yield Mismatch(_text("layer_scale", old, new), f"model.layer_scale={value}")


def _shape_setting(key: str, here: ModelConfig, there: ModelConfig) -> str:
    if here.arch != "custom" and there.arch != "custom":
        return f"model.arch={there.arch}"
    shape = vit_shape(there)._asdict()
    keys = [key] if here.arch == "custom" else list(shape)
    custom = "" if here.arch == "custom" else "model.arch=custom "
    return custom + " ".join(f"model.{name}={shape[name]}" for name in keys)


def _text(key: str, here: object, there: object) -> str:
    return f"model.{key} is {here} here and {there} there"


def _verb(key: str, here: int, there: int) -> str:
    """What tools/surgery.py does to a file's model to make it the run's."""
    match key:
        case "patch_size":
            return f"resize-patch --patch-size {here}"
        case "in_channels":
            return f"channels --to {here}"
        case "num_register_tokens" if here > there:
            return f"add-registers {here - there}"
        case "num_register_tokens":
            return f"drop-registers --keep {here}"
    return ""


def _other_interpolation(weights: Weights, model: ModelConfig) -> Iterator[Mismatch]:
    """How positions are interpolated belongs to the weights, where the file says it.

    Files of other programs do not. Allowed is then what the weights were trained with (known by the
    registers) or what the program makes of them.
    """
    allowed = [_interpolation(weights.model)]
    trained = target_interpolation(weights.model, "dinov2")
    if trained and not weights.described:
        allowed.insert(0, trained)
    here, keys = _interpolation(model), ("pos_embed_offset", "pos_embed_antialias")
    if here in allowed:
        return
    for key, old, new in zip(keys, _words(here), _words(allowed[0]), strict=True):
        if old != new:
            yield Mismatch(_text(key, old, new), f"model.{key}={new}")


def _interpolation(model: ModelConfig) -> tuple[float, bool]:
    return model.pos_embed_offset, model.pos_embed_antialias


def _words(interpolation: tuple[float, bool]) -> tuple[str, str]:
    return f"{interpolation[0]:g}", str(interpolation[1]).lower()


def _with_interpolation(there: ModelConfig, here: ModelConfig) -> ModelConfig:
    """The file's model with the run's interpolation: its own grid is what the run's model would compute."""
    return replace(
        there, pos_embed_offset=here.pos_embed_offset, pos_embed_antialias=here.pos_embed_antialias
    )
