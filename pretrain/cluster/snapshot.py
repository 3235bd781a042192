"""A copy of the code that a job runs: an edit in the checkout must not change a waiting job."""

import hashlib
import os
import shutil
from pathlib import Path

import pretrain
from pretrain.revision import REVISION, code_revision

PACKAGE = Path(pretrain.__file__).parent
SUFFIXES = (".py", ".typed")


def take_snapshot(run_dir: Path, package: Path = PACKAGE) -> Path:
    """Copy the package to `RUN_DIR/code/<hash>/`, unless the same code lies there already.

    Returns:
        The folder to start in: it holds `pretrain/` and the file REVISION.
    """
    files = sorted(path for path in package.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    target = run_dir / "code" / _digest(package, files)
    if target.exists():
        return target
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    for path in files:
        copy = temporary / package.name / path.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (temporary / REVISION).write_text(code_revision(package) + "\n")
    _publish(temporary, target)
    return target


def _digest(package: Path, files: list[Path]) -> str:
    """12 hexadecimal digits that name the code."""
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.relative_to(package)}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def _publish(temporary: Path, target: Path) -> None:
    """Give the copy its name; where another process was faster, its copy is the same."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(temporary)
