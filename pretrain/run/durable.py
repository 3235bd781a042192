"""Files that survive a crash: written under a temporary name, flushed to the disk, then renamed."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's list of names, to the disk.

    Raises:
        OSError: the disk is full or failed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, final: Path) -> None:
    """Flush a finished file and give it its final name; a file of that name is replaced in one step.

    Raises:
        OSError: as for `sync`; `final` is then what it was.
    """
    sync(temporary)
    temporary.replace(final)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old contents or the new ones.

    Raises:
        OSError: the disk is full or failed, or the folder is missing.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)
