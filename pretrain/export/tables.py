"""What was found out about weights, as text for a terminal."""

from collections.abc import Sequence

import torch
from rich import box
from rich.console import RenderableType
from rich.table import Table

from pretrain.config.derived import ffn_hidden_dim, position_grid, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.export.examine import Difference, Inspection, worst
from pretrain.surgery.conversion import Change

SHOWN = 10  # tensors that differ most


def architecture_line(model: ModelConfig) -> str:
    """A backbone in one line."""
    dim, depth, heads = vit_shape(model)
    rows, columns = position_grid(model)
    return (
        f"{model.arch}: width {dim}, {depth} blocks, {heads} heads, {model.ffn_layer} of "
        f"{ffn_hidden_dim(model)}, patch {model.patch_size}, positions {rows} x {columns}, "
        f"{model.in_channels} channels, {model.num_register_tokens} registers, {_test_time_register(model)}"
        f"{'no ' if model.layer_scale is None else ''}LayerScale; interpolation offset "
        f"{model.pos_embed_offset:g}, antialias {str(model.pos_embed_antialias).lower()}"
    )


def _test_time_register(model: ModelConfig) -> str:
    blocks = sorted({block for block, _ in model.register_neurons})
    number = len(model.register_neurons)
    return f"a test-time register of {number} neurons in blocks {blocks}, " if number else ""


def changes_table(changes: Sequence[Change]) -> list[RenderableType]:
    """What is not as it was in the source; nothing where all is."""
    if not changes:
        return []
    table = _table("", "what", "why")
    for change in changes:
        table.add_row(change.kind, change.what, change.why)
    return [table]


def inspection_tables(found: Inspection) -> list[RenderableType]:
    """Format and architecture, a row a tensor, and what is suspicious."""
    table = _table("tensor", "shape", "type", "norm", "largest", "spectral norm", "NaN, Inf")
    for fact in found.tensors:
        spectral = "" if fact.spectral is None else f"{fact.spectral:.4g}"
        bad = f"{fact.nan}, {fact.inf}" if fact.nan or fact.inf else ""
        shape = " x ".join(map(str, fact.shape))
        table.add_row(fact.name, shape, fact.dtype, f"{fact.norm:.4g}", f"{fact.largest:.4g}", spectral, bad)
    parameters = sum(torch.Size(fact.shape).numel() for fact in found.tensors)
    suspicious = [f"suspicious: {line}" for line in found.suspicions]
    return [
        f"{found.path}: {found.kind}, {found.layout or 'no known backbone'}",
        architecture_line(found.model) if found.model else found.reason,
        *(f"{change.kind}: {change.what} ({change.why})" for change in found.changes),
        table,
        f"{len(found.tensors)} tensors, {parameters:,} parameters",
        *(suspicious or ["nothing suspicious"]),
    ]


def difference_tables(found: Difference) -> list[RenderableType]:
    """Architecture, the tensors that differ most, and features."""
    parts: list[RenderableType] = [f"architecture: {line}" for line in found.architecture]
    if found.features is None:
        return [*parts, "their tensors have other names or shapes: nothing to compare"]
    differing = [row for row in found.tensors if row.largest != 0]
    parts.append(f"{len(differing)} of {len(found.tensors)} tensors differ; features by {found.features:.2e}")
    if differing:
        table = _table("differ most", "relative", "cosine", "largest")
        for row in worst(differing, SHOWN):
            table.add_row(row.name, f"{row.relative:.2e}", f"{row.cosine:.6f}", f"{row.largest:.2e}")
        parts.append(table)
    return [*parts, *swapped_lines(found.swapped)]


def swapped_lines(swapped: dict[str, str]) -> list[RenderableType]:
    """Names the order of q, k and v in B, where it is only that."""
    if not swapped:
        return []
    name, order = next(iter(swapped.items()))
    return [f"{len(swapped)} qkv tensors of B have A's thirds in the order {' '.join(order)}, as {name}"]


def _table(first: str, *others: str) -> Table:
    """Columns without rules, as wide as they must be: names stay whole in a pipe too."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name)
    return table
