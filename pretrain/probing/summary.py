"""What rows of probes say: the place to probe, against the usual one, the oracle's, and controls."""

import math
from collections.abc import Sequence

from pretrain.analysis.page import Table
from pretrain.analysis.taps import POINTS, Point
from pretrain.probing.rows import Row, Score, best, oracle


def tasks(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(fitted on, protocol) of the rows, in their order."""
    return list(dict.fromkeys((row.fitted_on, row.protocol) for row in rows))


def plain(rows: Sequence[Row]) -> list[Row]:
    """Those of real places: controls are comparisons, not places to probe."""
    return [row for row in rows if row.control == "none"]


def usual(rows: Sequence[Row], pool: str) -> Row | None:
    """The output of the last block, where probes are usually fitted; None where it was left out."""
    found = [row for row in plain(rows) if row.point == "RC2" and row.pool == pool]
    return max(found, key=lambda row: row.block, default=None)


def answer(rows: Sequence[Row]) -> str:
    """One line: where to probe for the data of one task."""
    chosen = best(plain(rows))
    line = f"probe block {chosen.block}, {chosen.point} ({chosen.pool}, {_strength(chosen)}): "
    line += f"{chosen.val:.1f} % on validation" + "".join(
        f", {_shown(score)} on {name}" for name, score in chosen.test.items()
    )
    common = usual(rows, chosen.pool)
    if common is None or common.key == chosen.key:
        return line + ("; it is the usual place" if common else "")
    there = ", ".join(f"{score.accuracy:.1f} % on {name}" for name, score in common.test.items())
    return f"{line}; the usual place, the output of block {common.block}: {there}"


def _strength(row: Row) -> str:
    return f"k = {row.chosen:g}" if row.solver == "knn" else f"C = {row.chosen:g}"


def _shown(score: Score) -> str:
    return f"{score.accuracy:.1f} % [{score.low:.1f}, {score.high:.1f}]"


def chosen_table(rows: Sequence[Row]) -> Table:
    """For each pool and test set: the place that validation chooses, the usual one, and the oracle's."""
    body = []
    for pool in dict.fromkeys(row.pool for row in rows):
        of_pool = [row for row in plain(rows) if row.pool == pool]
        chosen, common = best(of_pool), usual(of_pool, pool)
        for name, score in chosen.test.items():
            ideal = oracle(of_pool, name)
            there = f"{common.test[name].accuracy:.1f}" if common else ""
            figures = [str(chosen.place), f"{chosen.val:.1f}", _shown(score), there]
            body.append([f"{pool}, {name}", *figures, f"{ideal.test[name].accuracy:.1f} at {ideal.place}"])
    heads = ["pool, test set", "chosen by validation", "validation %", "test %", "usual place %", "oracle %"]
    return Table(heads, body)


def modules_table(rows: Sequence[Row], pool: str) -> Table:
    """The paper's table 1: of each module the best test accuracy over blocks, and how often it is the best.

    An oracle's view: the block is chosen on the test images.
    """
    of_pool = [row for row in plain(rows) if row.pool == pool]
    names = [f"{fitted} -> {name}" for fitted, _, name in _columns(of_pool)]
    points = [point for point in POINTS if any(row.point == point for row in of_pool)]
    columns = [_best_by_module(of_pool, column) for column in _columns(of_pool)]
    winners = [max(column, key=lambda point: column[point]) for column in columns if column]
    body = []
    for point in points:
        scores = [column.get(point, math.nan) for column in columns]
        mean = sum(scores) / len(scores)
        won = 100 * sum(winner == point for winner in winners) / len(winners)
        body.append([point, *(f"{score:.1f}" for score in scores), f"{mean:.1f}", f"{won:.0f} %"])
    return Table(["module", *names, "mean", "win rate"], body)


def _columns(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(fitted on, protocol, test set) of all scores."""
    found = ((row.fitted_on, row.protocol, name) for row in rows for name in row.test)
    return list(dict.fromkeys(found))


def _best_by_module(rows: Sequence[Row], column: tuple[str, str, str]) -> dict[Point, float]:
    fitted, protocol, name = column
    scores: dict[Point, float] = {}
    for row in rows:
        if (row.fitted_on, row.protocol) == (fitted, protocol) and name in row.test:
            scores[row.point] = max(scores.get(row.point, 0.0), row.test[name].accuracy)
    return scores


def controls_table(rows: Sequence[Row]) -> Table:
    """Whether width explains a difference: each module at its best block by validation, and its controls."""
    groups = list(dict.fromkeys((row.point, row.control) for row in rows))
    ordered = sorted(groups, key=lambda group: (POINTS.index(group[0]), group[1] != "none", group[1]))
    body = []
    for point, control in ordered:
        chosen = best([row for row in rows if (row.point, row.control) == (point, control)])
        name = point if control == "none" else f"{point}, {control}"
        tests = [_shown(score) for score in chosen.test.values()]
        figures = [f"{chosen.width}", f"{chosen.block}", chosen.pool, f"{chosen.val:.1f}"]
        body.append([name, *figures, *tests])
    names = [f"{name} %" for name in rows[0].test]
    return Table(["module", "channels", "block", "pool", "validation %", *names], body)


def grid(rows: Sequence[Row], pool: str, name: str | None) -> tuple[list[str], list[str], list[list[float]]]:
    """Blocks, modules and accuracies in percent, of a test set or (None) of validation; NaN where none is."""
    chosen = {(row.block, row.point): row for row in plain(rows) if row.pool == pool}
    blocks = sorted({block for block, _ in chosen})
    points = [point for point in POINTS if any(point == other for _, other in chosen)]

    def value(block: int, point: Point) -> float:
        row = chosen.get((block, point))
        if row is None:
            return math.nan
        return row.val if name is None else row.test[name].accuracy

    return [str(b) for b in blocks], list(points), [[value(b, p) for p in points] for b in blocks]
