"""Table and picture of benchmarks/rmlp_study.py."""

import io
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Measures = Mapping[str, float]
Results = dict[str, dict[str, list[Measures]]]  # group, setting, seed
COLUMNS = {
    "knn_percent": ("k-NN, %", 1),
    "linear_percent": ("linear, %", 1),
    "high_norm_patches_percent": ("high-norm patches, %", 2),
    "attention_entropy": ("attention entropy", 3),
    "consistency_flip": ("consistency, flip", 3),
    "consistency_crop": ("consistency, crop", 3),
    "consistency_other_image": ("consistency, other image", 3),
    "feature_rank": ("feature rank", 1),
    "patch_rank": ("patch rank", 1),
}
DRAWN = ("knn_percent", "linear_percent", "attention_entropy", "consistency_crop", "feature_rank")
DOMAINS = ("corrupted", "clean")


def markdown(found: Results, facts: Mapping[str, Any], picture: str | None = None) -> str:
    """A table for each domain: mean over the seeds, and their deviation in brackets."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()) + "."]
    for domain in DOMAINS:
        lines += ["", f"Judged on {domain} images:", ""]
        lines.append("| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
        lines.append("|---|" + "--:|" * len(COLUMNS))
        for group, settings in found.items():
            for name, runs in settings.items():
                lines.append(_row(f"{group}: {name}", [_cell(runs, domain, key) for key in COLUMNS]))
    if picture:
        lines += ["", f"![measures by setting]({picture})"]
    return "\n".join(lines) + "\n"


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(runs: Sequence[Measures], domain: str, key: str) -> str:
    values, digits = [run[f"{domain}/{key}"] for run in runs], COLUMNS[key][1]
    spread = f" ({stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def document(found: Results, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All figures, seed by seed."""
    return {**facts, "results": found}


def draw(found: Results) -> bytes:
    """A point for each seed, settings from top to bottom, the common checkpoint as a line; SVG."""
    rows = [(group, name) for group, settings in found.items() for name in settings if group != "before"]
    figure = Figure(figsize=(3 + 2.1 * len(DRAWN), 1.0 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(DRAWN), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, DRAWN, strict=True):
        for domain, marker, colour in zip(DOMAINS, "ox", ("#1f5fa8", "#9aa7b8"), strict=True):
            for place, (group, name) in enumerate(rows):
                values = [run[f"{domain}/{key}"] for run in found[group][name]]
                label = domain if place == 0 else None
                axis.scatter(values, [place] * len(values), marker=marker, color=colour, s=16, label=label)
            for run in found["before"]["common checkpoint"]:
                axis.axvline(run[f"{domain}/{key}"], color=colour, linewidth=0.8, linestyle="--")
        axis.set_title(COLUMNS[key][0], fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", linewidth=0.3)
    axes[0].set_yticks(range(len(rows)), [f"{group}: {name}" for group, name in rows])
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=7)
    file = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(file)
    return file.getvalue()
