"""Each equation of docs/method.md stands beside code that exists."""

import importlib
import operator
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs/method.md").read_text()
NAMED = re.compile(r"`(\w+)/(\w+)\.py: ([\w.]+)`")
TABLES = re.findall(r"^\|.*\|$", TEXT.partition("## Where this differs")[0], re.MULTILINE)
EQUATIONS = [row for row in TABLES if not row.startswith(("| what |", "|---"))]


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: row.split("|")[1].strip())
def test_each_equation_names_code_that_exists(row: str) -> None:
    named = NAMED.findall(row.split("|")[-2])
    assert named and row.split("|")[-2].count(".py") == len(named)
    for package, module, name in named:
        assert callable(operator.attrgetter(name)(importlib.import_module(f"pretrain.{package}.{module}")))
