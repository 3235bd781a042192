"""What a test-time register does, as text for a terminal."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich import box
from rich.table import Table

from pretrain.sinder.register_neurons import RegisterNeuron
from pretrain.sinder.registers_file import RegistersReport


def report_parts(out: Path, hook: Path | None, report: RegistersReport) -> list[str | Table]:
    """Lines and tables: before, the numbers of neurons that were tried, each block, and what was written."""
    parts: list[str | Table] = [f"before: {report.before.verdict}: {report.before.reason}"]
    parts += [f"left out: {line}" for line in sorted(set(report.damaged_images))]
    if report.outcome == "nothing to do":
        return [*parts, "nothing to do, nothing written"]
    parts += [
        f"neurons of blocks 0 to {report.last_block}, found on {report.images} images; the figures are of "
        f"{report.held_out} others; class token and clean patches: cosine to the original",
        _trials(report),
    ]
    if report.chosen is None:
        return [*parts, f"{report.outcome}, nothing written"]
    parts += [_blocks(report), *_neurons(report.neurons)]
    parts += [f"{change.kind}: {change.what} ({change.why})" for change in report.changes]
    parts.append(f"{out}: {_summary(report)}")
    return [*parts, f"{hook}: attach(model) for transformers"] if hook else parts


def _summary(report: RegistersReport) -> str:
    assert report.chosen is not None
    (number, after), worst = report.chosen, report.outlier_block
    neurons = f"{number} neuron" if number == 1 else f"{number} neurons"
    shares = f"{100 * report.shares[worst]:.2f} to {100 * after.by_both[worst]:.2f} % of the patches"
    return f"{report.outcome} by {neurons} ({shares} after block {worst}); now {report.verdict_after}"


def _trials(report: RegistersReport) -> Table:
    worst = report.outlier_block
    table = _table("neurons", f"defective patches after block {worst} %", "class token", "clean patches")
    table.add_row("0", f"{100 * report.shares[worst]:.2f}", "", "")
    for number, measure in report.trials:
        share = f"{100 * measure.by_both[worst]:.2f}"
        table.add_row(f"{number}", share, f"{measure.cls_cosine:.4f}", f"{measure.patch_cosine:.4f}")
    return table


def _blocks(report: RegistersReport) -> Table:
    assert report.chosen is not None
    table = _table("block", "defective patches before %", "after %")
    for index, shares in enumerate(zip(report.shares, report.chosen.measure.by_both, strict=True)):
        table.add_row(f"{index}", *(f"{100 * share:.2f}" for share in shares))
    return table


def _neurons(neurons: Sequence[RegisterNeuron]) -> list[str]:
    """A line for each block with neurons."""
    ordered = sorted(neurons)
    return [
        f"block {block}: {', '.join(str(neuron.unit) for neuron in group)}"
        for block, group in groupby(ordered, key=lambda neuron: neuron.block)
    ]


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right")
    return table
