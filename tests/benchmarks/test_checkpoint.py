"""The checkpoint benchmark at toy size: both ways are timed, in one process and on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_last_line_has_the_figures(tmp_path: Path, ranks: int) -> None:
    options = f"--arch tiny --ranks {ranks} --repeats 2 --steps 1 --folder {tmp_path}"
    done = subprocess.run(
        [sys.executable, "benchmarks/checkpoint.py", *options.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["ranks"] == ranks
    for way in ("at once", "behind training"):
        assert len(figures[way]["standstill_of_each_turn_s"]) == 2
        assert 0 < figures[way]["standstill_s"] <= figures[way]["written_after_s"]
    assert list(tmp_path.iterdir()) == []
