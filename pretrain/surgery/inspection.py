"""What a look at every tensor shows: sizes, norms, values that are not finite, and what is suspicious."""

import re
from collections import defaultdict
from dataclasses import dataclass
from statistics import median

import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from pretrain.surgery.layouts import State
from pretrain.surgery.progress import Advance, ignore

OUTLIER = 5.0  # times the median of the same tensor in the other blocks
UNTRAINED_SCALE = 1e-5  # DINOv2's initial LayerScale


@dataclass(frozen=True)
class TensorFacts:
    """One tensor; norms are of its finite values, in float64."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float  # Frobenius
    largest: float  # of the absolute values
    nan: int
    inf: int
    spectral: float | None  # largest singular value; of matrices (and the patch embedding, flattened) only
    constant: bool  # more than one value, all the same


def inspect_tensor(name: str, tensor: Tensor, spectral: bool = True) -> TensorFacts:
    """The facts of one tensor.

    Args:
        name: of the tensor.
        tensor: of any dtype.
        spectral: whether to compute the spectral norm.
    """
    values = tensor.float() if tensor.dtype != torch.float64 else tensor  # fp8 has no tests of its own
    nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
    finite = values if not nan + inf else values.nan_to_num(0.0, 0.0, 0.0)
    flat = finite.flatten()
    return TensorFacts(
        name,
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix("torch."),
        torch.linalg.vector_norm(flat, dtype=torch.float64).item(),
        flat.abs().max().item() if flat.numel() else 0.0,
        nan,
        inf,
        spectral_norm(finite.flatten(1)) if spectral and _is_matrix(name, tensor) else None,
        flat.numel() > 1 and bool((flat == flat[0]).all()),
    )


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of a matrix, by Lanczos iteration; relative error below 1e-4; 0 if empty."""
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    if scale == 0:
        return 0.0
    matrix = matrix / scale  # so that no square overflows
    if min(matrix.shape) < 3:  # too small for the iteration
        return scale * float(torch.linalg.matrix_norm(matrix.double(), ord=2))
    start = torch.ones(min(matrix.shape), dtype=matrix.dtype).numpy()
    values = svds(matrix.numpy(), k=1, tol=1e-4, v0=start, return_singular_vectors=False)
    return scale * float(values[0])


def suspicions(facts: list[TensorFacts]) -> list[str]:
    """Lines about tensors that a healthy backbone does not have; empty = nothing stands out."""
    lines = [
        f"{f.name}: {f.nan} NaN and {f.inf} Inf among {_size(f.shape)} values"
        for f in facts
        if f.nan or f.inf
    ]
    lines += [
        f"{f.name}: all {_size(f.shape)} values are {f.largest:g}: was it ever loaded?"
        for f in facts
        if f.constant and f.name.endswith(".weight") and "norm" not in f.name
    ]
    lines += _outliers(facts, "norm", "norm") + _outliers(facts, "spectral", "spectral norm")
    scales = [f for f in facts if f.name.endswith(".gamma")]
    if scales and all(f.constant and abs(f.largest - UNTRAINED_SCALE) < 1e-9 for f in scales):
        lines.append("every LayerScale factor is 1e-5, DINOv2's initial value: these weights are untrained")
    dtypes = sorted({f.dtype for f in facts})
    if len(dtypes) > 1:
        lines.append(f"several types of numbers: {', '.join(dtypes)}")
    return lines


def _outliers(facts: list[TensorFacts], attribute: str, words: str) -> list[str]:
    """Weights whose norm is far from that of the same weight in the other blocks."""
    alike: dict[str, dict[str, float]] = defaultdict(dict)
    for fact in facts:
        value = getattr(fact, attribute)
        if value is not None and fact.name.endswith("weight"):
            alike[re.sub(r"\.\d+\.", ".*.", fact.name)][fact.name] = value
    lines = []
    for values in alike.values():
        usual = median(values.values())
        for name, value in values.items():
            if len(values) > 2 and not usual / OUTLIER <= value <= usual * OUTLIER:
                lines.append(
                    f"{name}: {words} {value:.3g}, against a median of {usual:.3g} in the other blocks"
                )
    return lines


def first_not_finite(state: State, advance: Advance = ignore) -> str | None:
    """The name of the first tensor with a NaN or Inf, or None."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            return name
        advance(tensor.nbytes)
    return None


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith("weight") and tensor.ndim in (2, 4)


def _size(shape: tuple[int, ...]) -> str:
    return f"{torch.Size(shape).numel():,}"
