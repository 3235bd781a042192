"""The result of a probing run: one row a probe, appended as it is done, so that nothing is fitted twice."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pretrain.analysis.taps import Place, Point
from pretrain.errors import InputError, first_line
from pretrain.probing.store import Pool

Protocol = Literal["transfer", "pretrain"]  # fitted on clean images; fitted on the shifted ones (paper)
Control = Literal["none", "random projection", "PCA", "random features"]
Kind = Literal["torch", "sklearn", "ridge", "knn"]


class Score(NamedTuple):
    """Accuracy on one set of images, in percent, with its bootstrap interval."""

    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One probe: fitted at one place, C chosen on validation images."""

    fitted_on: str  # name of the set
    protocol: Protocol
    block: int
    point: Point
    pool: Pool
    control: Control
    width: int  # channels that the probe sees
    solver: Kind
    chosen: float  # C, or k of k-NN
    val: float  # percent, at the chosen one
    val_by_choice: dict[str, float]
    test: dict[str, Score]  # by set; the first is the plain test set where there is one
    fit_images: int
    val_images: int
    iterations: int
    converged: bool
    seed: int

    @property
    def place(self) -> Place:
        """Where."""
        return Place(self.block, self.point)

    @property
    def key(self) -> tuple[object, ...]:
        """What names the row within a run."""
        return (self.fitted_on, self.protocol, self.block, self.point, self.pool, self.control)


class Rows:
    """The rows of one run in `rows.jsonl`; its first line says what the run was asked for."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        """Read what an interrupted run has.

        Args:
            path: of the file.
            asked: everything that rows depend on.

        Raises:
            InputError: the file is of another run.
        """
        self.path, self.asked = path, json.loads(json.dumps(asked))
        self.rows: list[Row] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            *whole, rest = self.path.read_text().split("\n")
            head, *rows = map(json.loads, whole or ['{"asked": {}}'])
            asked: dict[str, Any] = dict(head["asked"])
            self.rows = [_row(row) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.path}: is no record of probes ({first_line(error)}); choose another --out"
            ) from error
        if self.rows and asked != self.asked:
            changed = [name for name in self.asked if asked.get(name) != self.asked[name]]
            what = ", ".join(changed) or "settings"
            raise InputError(f"{self.path}: is of a run with other {what}; choose another --out")
        if rest:  # a line that a killed run left half written
            with self.path.open("r+b") as file:
                file.truncate(file.seek(0, 2) - len(rest.encode()))

    def _append(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text + "\n")

    def add(self, row: Row) -> None:
        """Write one row; it is complete on return. The file begins with the first one."""
        if not self.rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"asked": self.asked}) + "\n")
        self.rows.append(row)
        self._append(json.dumps(asdict(row), allow_nan=False))


def _row(values: dict[str, Any]) -> Row:
    scores = {name: Score(*score) for name, score in values.pop("test").items()}
    return Row(**values, test=scores)


def best(rows: Sequence[Row]) -> Row:
    """By validation accuracy; of equal ones the first block, then the narrower features."""
    return max(rows, key=lambda row: (row.val, -row.block, -row.width))


def oracle(rows: Sequence[Row], name: str) -> Row:
    """By accuracy on a test set: what nobody could have chosen, for comparison with the paper's tables."""
    return max(rows, key=lambda row: (row.test[name].accuracy, -row.block, -row.width))
