"""A script of benchmarks/ as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def benchmark(name: str, *arguments: object, threads: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run benchmarks/NAME.py to its end; `threads` limits those of OpenMP."""
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
