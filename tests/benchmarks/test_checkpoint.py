"""The checkpoint benchmark at toy size: both ways are timed, in one process and on two ranks."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.running import benchmark


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_last_line_has_the_figures(tmp_path: Path, ranks: int) -> None:
    options = f"--arch tiny --ranks {ranks} --repeats 2 --steps 1 --folder {tmp_path}"
    done = benchmark("checkpoint", *options.split())
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["ranks"] == ranks
    for way in ("at once", "behind training"):
        assert len(figures[way]["standstill_of_each_turn_s"]) == 2
        assert 0 < figures[way]["standstill_s"] <= figures[way]["written_after_s"]
    assert list(tmp_path.iterdir()) == []
