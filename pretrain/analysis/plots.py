"""Plots and pictures for reports, as bytes of SVG and PNG files; the same input gives the same bytes."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import Image
from torch import Tensor

STYLE: Any = {
    "svg.hashsalt": "pretrain",  # else names inside the file are random
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "legend.frameon": False,
}
SIZE = (5.4, 3.0)  # inches
HEAT, GRADED = "magma", "viridis"


def lines(
    curves: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    limits: Mapping[str, float] | None = None,
    log: bool = False,
    places: Sequence[float] | None = None,
) -> bytes:
    """Curves over 0, 1, 2, ... with a legend where there are several.

    Args:
        curves: name to values.
        x_label: what the positions are.
        y_label: with the unit.
        limits: name to a value that is drawn as a dashed line.
        log: a logarithmic axis; only for values above 0.
        places: where the values stand instead, on a logarithmic axis.
    """
    with rc_context(STYLE):
        figure, axes = _empty(x_label, y_label)
        for name, values in curves.items():
            axes.plot(
                places or range(len(values)), values, marker=".", markersize=4, linewidth=1.3, label=name
            )
        for name, value in (limits or {}).items():
            axes.axhline(value, color="#8b949e", linewidth=0.9, linestyle="--", label=name)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        if places:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) + len(limits or {}) > 1:
            axes.legend(fontsize=8)
        return _svg(figure)


def histogram(groups: Mapping[str, Tensor], x_label: str, limits: Mapping[str, float] | None = None) -> bytes:
    """How often values occur, on a logarithmic axis: a few outliers among thousands stay visible.

    Args:
        groups: name to finite values of any shape.
        x_label: with the unit.
        limits: name to a value that is drawn as a dashed line.
    """
    with rc_context(STYLE):
        figure, axes = _empty(x_label, "patches")
        values = {name: group.flatten().numpy() for name, group in groups.items()}
        ends = np.concatenate(list(values.values()))
        edges = np.linspace(ends.min(), max(ends.max(), ends.min() + 1e-6), 61)
        for name, group in values.items():
            axes.hist(group, bins=edges.tolist(), histtype="step", linewidth=1.3, label=name)
        for name, value in (limits or {}).items():
            axes.axvline(value, color="#8b949e", linewidth=0.9, linestyle="--", label=name)
        axes.set_yscale("log")
        if len(groups) + len(limits or {}) > 1:
            axes.legend(fontsize=8)
        return _svg(figure)


def heat_map(values: Tensor, x_label: str, y_label: str, unit: str) -> bytes:
    """A matrix (h, w) as colours, with their scale."""
    with rc_context(STYLE):
        figure, axes = _empty(x_label, y_label, (4.0, 3.2))
        axes.grid(False)
        drawn = axes.imshow(values.numpy(), cmap=HEAT, vmin=0)
        figure.colorbar(drawn, ax=axes, label=unit)
        return _svg(figure)


def labelled_heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], y_label: str, unit: str
) -> bytes:
    """A table of figures as colours, each figure in its cell; NaN stays empty.

    Args:
        values: a sequence for each row.
        rows: their names.
        columns: names of the columns.
        y_label: what the rows are.
        unit: of the figures, beside their scale.
    """
    with rc_context(STYLE):
        figure, axes = _empty("", y_label, (1.6 + 0.55 * len(columns), 1.2 + 0.27 * len(rows)))
        axes.grid(False)
        numbers = np.array(values, float)
        drawn = axes.imshow(numbers, cmap=GRADED, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        middle = (np.nanmin(numbers) + np.nanmax(numbers)) / 2
        for (row, column), value in np.ndenumerate(numbers):
            if np.isfinite(value):
                colour = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=7)
        figure.colorbar(drawn, ax=axes, label=unit)
        return _svg(figure)


def heat(values: Tensor, low: float, high: float) -> Tensor:
    """Values (..., h, w) as colours (..., 3, h, w) from 0 to 1, dark to bright, `low` to `high`."""
    place = ((values - low) / max(high - low, 1e-12)).clamp(0, 1)
    colours = colormaps[HEAT](place.numpy())[..., :3]
    return torch.from_numpy(colours).float().movedim(-1, -3)


def png(picture: Tensor) -> bytes:
    """A picture (3, h, w) from 0 to 1 as a PNG file, a pixel each."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(file, "PNG", optimize=True)
    return file.getvalue()


def _empty(x_label: str, y_label: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _svg(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
