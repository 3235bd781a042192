"""Where weights come from: each tool adds an entry to a list that travels with them."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pretrain
from pretrain.revision import code_revision
from pretrain.surgery.progress import Advance, Stage, ignore, silent

BLOCK = 16 << 20  # bytes read at once
KEY = "provenance"  # of an export's `about`


def with_entry(
    about: Mapping[str, Any],
    tool: str,
    arguments: Sequence[str],
    sources: Sequence[Path],
    stage: Stage = silent,
    origins: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What is known of the source's origin, and this step after it.

    Args:
        about: of the source.
        tool: that makes the new weights.
        arguments: its command line.
        sources: files or folders that were read.
        stage: tells how far the hashing is.
        origins: what is known of each source, where `about` is not that of the only one.
    """
    advance = stage("hashing the source", sum(map(size, sources)))
    entry: dict[str, Any] = {
        "tool": tool,
        "version": version("pretrain"),
        "revision": _revision(),
        "arguments": list(arguments),
        "sources": [{"path": str(path), "sha256": sha256(path, advance)} for path in sources],
    }
    for source, origin in zip(entry["sources"], origins, strict=bool(origins)):
        source["about"] = dict(origin)
    return {**about, KEY: [*about.get(KEY, []), entry]}


def common(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several origins say alike; their lists of tools stay with each."""
    first = {key: value for key, value in abouts[0].items() if key != KEY}
    return {key: value for key, value in first.items() if all(a.get(key) == value for a in abouts)}


@cache
def _revision() -> str:
    return code_revision(Path(pretrain.__file__).parent)


def sha256(path: Path, advance: Advance = ignore) -> str:
    """Of a file's bytes; of a folder: over the sorted relative names and hashes of its files."""
    if not path.is_dir():
        return _file(path, advance)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {_file(file, advance)}\n".encode())
    return digest.hexdigest()


def size(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _file(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
