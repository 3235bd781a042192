"""Let a DeepSpeed checkpoint be continued with another number of ranks.

    python tools/universal.py runs/vitl/checkpoints/step_00010000

Writes optim/universal/ into the checkpoint, which is about as large as optim/zero/, and changes nothing else.
"""

import argparse
import sys
from pathlib import Path

from pretrain.command_line import Parser, exit_status
from pretrain.engines.deepspeed_checkpoint import convert


def main() -> int:
    """Convert and say where the result is."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_* folder")
    print(convert(parser.parse_args().checkpoint))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("universal.py", main))
