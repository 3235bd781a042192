"""Looks at files of weights without changing them: one alone, or two against each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export.folders import open_weights
from pretrain.export.foreign_models import features_of
from pretrain.export.weights import Weights, read_weights
from pretrain.surgery.architecture import Settings
from pretrain.surgery.compare import (
    TensorDifference,
    backbone_features,
    feature_difference,
    model_differences,
    noise_images,
    swapped_thirds,
    tensor_differences,
)
from pretrain.surgery.conversion import Change
from pretrain.surgery.inspection import TensorFacts, inspect_tensor, suspicions
from pretrain.surgery.progress import Stage, silent, size


@dataclass(frozen=True)
class Inspection:
    """What is known about a file of weights."""

    path: str
    kind: str  # of the file
    layout: str | None  # of the names; None where no backbone was recognised
    model: ModelConfig | None
    reason: str  # why no backbone was recognised
    about: dict[str, object]
    changes: tuple[Change, ...]  # against the file, in our form
    tensors: list[TensorFacts]
    suspicions: list[str]


@dataclass(frozen=True)
class Difference:
    """How two backbones differ."""

    architecture: list[str]  # lines; empty = the same
    tensors: list[TensorDifference]
    features: float | None  # largest difference on fixed images, relative to the largest feature
    swapped: dict[str, str]  # qkv tensors whose thirds have another order

    def beyond(self, tolerance: float) -> bool:
        """Whether anything differs by more; a difference that is not a number counts as one."""
        figures = [row.relative for row in self.tensors] + [self.features or 0.0]
        return bool(self.architecture) or any(not figure <= tolerance for figure in figures)


@dataclass(frozen=True)
class Verdict:
    """Whether two formats of a model compute the same."""

    programs: tuple[str, str]  # that computed each one's features
    difference: float  # largest, relative to the largest feature of the first
    swapped: dict[str, str]  # qkv tensors whose thirds have another order


def inspect(
    path: Path,
    branch: str | None = None,
    settings: Settings | None = None,
    spectral: bool = True,
    stage: Stage = silent,
) -> Inspection:
    """Everything that can be said about a file of weights, whether or not its backbone is known.

    Args:
        path: of any known format.
        branch: as for `read_weights`.
        settings: likewise.
        spectral: whether to compute spectral norms, which takes most of the time.
        stage: tells how far it is.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        found: Weights | None = read_weights(path, branch, settings, finite=False)
        reason = ""
    except InputError as error:
        found, reason = None, str(error)
    contents = None if found else open_weights(path)
    state = found.state if found else contents.tensors if contents else {}
    advance = stage("inspecting", size(state))
    facts = []
    for name, tensor in state.items():
        facts.append(inspect_tensor(name, tensor, spectral))
        advance(tensor.nbytes)
    return Inspection(
        str(path),
        found.kind if found else contents.kind if contents else "",
        found.layout if found else None,
        found.model if found else None,
        reason,
        found.about if found else {},
        found.changes if found else (),
        facts,
        suspicions(facts),
    )


def diff(a: Weights, b: Weights, stage: Stage = silent) -> Difference:
    """Architecture, every tensor, and features of two backbones on fixed images."""
    architecture = model_differences(a.model, b.model)
    alike = {n: t.shape for n, t in a.state.items()} == {n: t.shape for n, t in b.state.items()}
    if not alike:
        return Difference(architecture, [], None, {})
    rows = tensor_differences(a.state, b.state, stage("comparing", size(a.state)))
    features = 0.0
    if architecture or any(row.largest != 0 for row in rows):  # else they compute the same
        images = noise_images(a.model)
        features = feature_difference(*(backbone_features(w.state, w.model)(images) for w in (a, b)))
    return Difference(architecture, rows, features, swapped_thirds(a.state, b.state))


def verify(a: Weights, b: Weights) -> Verdict:
    """Features of two formats of one model, each by the program it is for, on images of the native size.

    Raises:
        InputError: the two take different images, or a program refuses its weights.
    """
    shapes = [noise_images(w.model).shape for w in (a, b)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{b.path}: takes images {tuple(shapes[1])}, {a.path} takes {tuple(shapes[0])}")
    (first, one), (second, other) = features_of(a), features_of(b)
    images = noise_images(a.model)
    tokens = first(images), second(images)
    if tokens[0].shape != tokens[1].shape:
        sizes = [tuple(part.shape) for part in tokens]
        raise InputError(f"{b.path}: gives tokens {sizes[1]}, {a.path} gives {sizes[0]}")
    comparable = a.state.keys() == b.state.keys()
    swapped = swapped_thirds(a.state, b.state) if comparable else {}
    return Verdict((one, other), feature_difference(*tokens), swapped)


def worst(rows: Sequence[TensorDifference], number: int) -> list[TensorDifference]:
    """The tensors that differ most."""
    return sorted(rows, key=lambda row: -row.relative)[:number]
