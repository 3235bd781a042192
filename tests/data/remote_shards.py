"""Small shards to be served, and their copies in a cache."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np

from tests.data.pictures import encode

PICTURE = encode(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
LONG_AGO = 10**18  # nanoseconds: in 2001


def tar_bytes(number: int, twice: bool = False) -> bytes:
    """A shard of three images and a long note, another one for each number; or with its first image twice."""
    members = [(f"{number}-{i}.jpg", PICTURE) for i in range(3)]
    members += [(f"{number}-0.json", b"[0]" + b" " * 40_000), *members[: int(twice)]]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


SHARDS = {f"x-{i}.tar": tar_bytes(i) for i in range(8)}
SIZE = len(SHARDS["x-0.tar"])


def shards_in(folder: Path) -> set[str]:
    """The base names of the copies."""
    return {path.name.split(".")[0] for path in folder.glob("*.tar")}


def make_unused(path: Path, rank: int) -> None:
    """As if a copy had been asked for last in 2001, later for a higher rank."""
    os.utime(path, ns=(LONG_AGO + rank, path.stat().st_mtime_ns))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
