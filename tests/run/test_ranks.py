"""Checkpoints that several ranks write and read together."""

from itertools import product
from pathlib import Path

import pytest

from tests.run.forked import run_script
from tests.run.layouts import LAYOUTS
from tests.run.two_ranks import CHECKS

pytestmark = pytest.mark.dist


def test_every_layout_loads_what_any_other_saved_bit_for_bit(tmp_path: Path) -> None:
    """One process, two equal ranks, shards on two and four, and 2 x 2; saved at once and behind training."""
    lines = run_script("tests.run.layouts", tmp_path)
    assert sorted(lines) == sorted(f"{one} -> {other}: equal" for one, other in product(LAYOUTS, repeat=2))


def test_two_ranks_fail_and_go_on_together(tmp_path: Path) -> None:
    assert run_script("tests.run.two_ranks", tmp_path) == [check.__name__ for check in CHECKS]


def kill_ranks(folder: Path, kills: int) -> None:
    """The script checks what each kill left; here only that enough of them fell into a save."""
    line = run_script("tests.run.killed_ranks", folder, kills, kills, timeout=60 * kills)[-1]
    assert int(line.split()[0]) == kills, line


def test_a_killed_rank_leaves_a_whole_checkpoint_and_no_hanging_partner(tmp_path: Path) -> None:
    kill_ranks(tmp_path, 4)


@pytest.mark.drill
def test_twenty_killed_ranks(tmp_path: Path) -> None:
    kill_ranks(tmp_path, 20)
