"""Which version of the code this is. No torch."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

REVISION = "REVISION"  # beside a copy of the package: the revision of what was copied


def code_revision(package: Path) -> str:
    """The git revision of the code in a folder, `(modified)` when its files differ from it.

    A package installed inside another checkout (in a virtual environment, say) is not of that revision, so
    only a folder whose `__init__.py` git tracks counts. A copy has a file `REVISION` beside it that tells.
    """
    with suppress(OSError):
        return (package.parent / REVISION).read_text().strip()
    revision = _git(package, "rev-parse", "HEAD")
    if revision is None or _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return "not a git checkout"
    changes = _git(package, "status", "--porcelain", "--", ".")
    return f"{revision} (modified)" if changes else revision


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None when there is no git, no checkout, or it fails."""
    # inside a git hook GIT_DIR and its kind would point git at another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
