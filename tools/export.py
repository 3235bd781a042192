"""Write the backbone in a training checkpoint as one file: weights to use, of the teacher or the student.

    python tools/export.py runs/default/checkpoints/latest teacher.safetensors
    python tools/export.py runs/default/checkpoints/step_00010000 student.pth --branch student

The checkpoint may be of any engine and number of ranks; neither a GPU nor a process group is needed. A .pth
file is a plain state dict, for other programs. The model is described in a .json beside either.
"""

import argparse
import sys
from pathlib import Path

from pretrain.command_line import Parser, exit_status
from pretrain.errors import InputError
from pretrain.export import export_checkpoint


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a step_* folder, or `latest`")
    parser.add_argument("target", metavar="TARGET", type=Path, help="a file *.safetensors or *.pth")
    parser.add_argument(
        "--branch", choices=["teacher", "student"], default="teacher", help="default: teacher"
    )
    parser.add_argument("--force", action="store_true", help="replace TARGET and its .json")
    return parser.parse_args()


def run() -> int:
    """Export, and say what was written."""
    options = parse()
    for path in (options.target, options.target.with_suffix(".json")):
        if path.exists() and not options.force:
            raise InputError(f"{path}: exists; choose another TARGET, or replace it with --force")
    path = export_checkpoint(options.checkpoint, options.branch, options.target)
    print(f"{path}: the {options.branch}'s backbone of {options.checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("export.py", run))
