"""`python -m tests.engines.several_runs A.yaml B.yaml`: one process, or rank, trains several configs."""

import os
import sys

from pretrain.cli import main


def run(paths: list[str]) -> int:
    """The worst exit status; each run has a port of its own, as the one before lingers."""
    port, worst = int(os.environ["MASTER_PORT"]), 0
    for i, path in enumerate(paths):
        os.environ["MASTER_PORT"] = str(port + i)
        worst = max(worst, main([path]))
    return worst


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
