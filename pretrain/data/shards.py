"""From the patterns in a configuration to an ordered list of local tar shards. No torch."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from braceexpand import braceexpand

from pretrain.errors import InputError

WILDCARDS = frozenset("*?[")


def list_shards(patterns: Sequence[str], key_name: str) -> list[Path]:
    """The shards that the patterns name: patterns in the order given, the matches of a wildcard sorted.

    Args:
        patterns: paths, with wildcards (`*`, `?`, `[0-9]`) or braces (`{000000..000012}`, `{train,extra}`).
        key_name: the setting that holds the patterns, for messages, such as `data.shards`.

    Raises:
        InputError: a pattern matches nothing, is remote, or names a shard that another pattern names too.
    """
    if not patterns:
        raise InputError(f"{key_name}: is empty; give at least one shard")
    shards = [shard for pattern in patterns for shard in _expand(pattern, key_name)]
    _refuse_repeats(shards, key_name)
    return shards


def _expand(pattern: str, key_name: str) -> Iterable[Path]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(
            f"{key_name}: {pattern}: remote shards are not supported; copy them to a local folder"
        )
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{key_name}: {pattern}: braces do not match") from error
    for name in names:
        yield from _match(os.path.expanduser(name), pattern, key_name)  # noqa: PTH111  (keeps a leading ./)


def _match(name: str, pattern: str, key_name: str) -> list[Path]:
    """The files of one brace-free name."""
    if WILDCARDS.intersection(name) and not Path(name).exists():
        found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  (the pattern may be absolute)
        if not found:
            raise InputError(f"{key_name}: no shard matches {_named(name, pattern)}")
    else:
        found = [name]
    for path in map(Path, found):
        _check_file(path, pattern, key_name)
    return [Path(path) for path in found]


def _check_file(path: Path, pattern: str, key_name: str) -> None:
    if path.is_dir():
        raise InputError(f"{key_name}: {path} is a folder; write {path / '*.tar'}")
    if not path.is_file():
        raise InputError(f"{key_name}: no shard {_named(str(path), pattern)}")


def _named(name: str, pattern: str) -> str:
    return name if name == pattern else f"{name} (of {pattern})"


def _refuse_repeats(shards: Sequence[Path], key_name: str) -> None:
    """A shard listed twice would silently weigh double."""
    seen: set[Path] = set()
    for shard in shards:
        if shard in seen:
            raise InputError(f"{key_name}: {shard} is named twice; every shard may appear once")
        seen.add(shard)
