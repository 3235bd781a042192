"""Rows of a file are those of the array, and far apart ones are read without what lies between."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pretrain.probing.store import GAP, FileRows


@pytest.mark.parametrize("share", [1.0, 0.5, 0.02])
def test_ascending_rows_are_those_of_the_array(share: float, tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((1000, 3), np.float32)
    array.tofile(tmp_path / "rows.f32")
    file = FileRows(tmp_path / "rows.f32", 1000)
    rows = np.flatnonzero(np.random.default_rng(1).random(1000) < share)
    assert len(rows) and (share > 0.1 or np.diff(rows).max() > GAP)
    assert np.array_equal(file[rows], array[rows]) and np.array_equal(file[10:20], array[10:20])
    assert file[rows[:0]].shape == (0, 3)


def test_what_lies_between_distant_rows_is_not_read(tmp_path: Path) -> None:
    path, number = tmp_path / "rows.f32", 2**22
    with path.open("wb") as file:
        file.truncate(number * 2 * 4)  # 32 MiB of holes
    tracemalloc.start()
    found = FileRows(path, number)[np.array([0, 1, number // 2, number - 1])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (4, 2) and peak < 2**16
