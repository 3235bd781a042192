"""From the patterns in a configuration to an ordered list of tar shards, local and remote. No torch."""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from braceexpand import braceexpand

from pretrain.config.schema import LogConfig
from pretrain.data.remote import is_remote, local_path, scheme, shown
from pretrain.errors import InputError

WILDCARDS = frozenset("*?[")
REMOTE_WILDCARD = re.compile(r"^[^/]*//[^/]*/[^?]*[*\[]")  # behind the host, before the parameters


def shard_names(patterns: Sequence[str], key_name: str) -> list[str]:
    """The shards that the patterns name: patterns in the order given, the matches of a wildcard sorted.

    A local shard has to exist; a remote one (`https://host/x.tar`, `pipe:COMMAND`) is not looked at.

    Args:
        patterns: paths with wildcards (`*`, `?`, `[0-9]`) or braces (`{000000..000012}`, `{train,extra}`),
            addresses with braces.
        key_name: the setting that holds the patterns, for messages, such as `data.shards`.

    Raises:
        InputError: a pattern matches nothing, or names a shard that another pattern names too.
    """
    if not patterns:
        raise InputError(f"{key_name}: is empty; give at least one shard")
    shards = [shard for pattern in patterns for shard in _expand(pattern, key_name)]
    _refuse_repeats(shards, key_name)
    return shards


def list_shards(patterns: Sequence[str], key_name: str) -> list[Path]:
    """`shard_names` where only local shards will do.

    Raises:
        InputError: as `shard_names`, or a shard is remote.
    """
    for pattern in patterns:
        if is_remote(pattern):
            raise InputError(f"{key_name}: {shown(pattern)}: must be a local file; copy it here")
    return [Path(name) for name in shard_names(patterns, key_name)]


def check_logged_shards(log: LogConfig) -> None:
    """Find the shards that a run looks at while it trains: the last look may be days from its start.

    Raises:
        InputError: as `list_shards`.
    """
    named = {
        "log.knn.train": log.knn.train,
        "log.knn.test": log.knn.test,
        "log.images.shards": log.images.shards,
        "log.artifacts.shards": log.artifacts.shards,
    }
    for key, patterns in named.items():
        if patterns:
            list_shards(patterns, key)


def _expand(pattern: str, key_name: str) -> Iterable[str]:
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{key_name}: {shown(pattern)}: braces do not match") from error
    if is_remote(pattern):
        _refuse_remote_wildcard(pattern, key_name)
        yield from names
        return
    for name in names:
        path = os.path.expanduser(local_path(name))  # noqa: PTH111  (keeps a leading ./)
        yield from map(str, _match(path, pattern, key_name))


def _refuse_remote_wildcard(pattern: str, key_name: str) -> None:
    """Nothing can be listed over there; in a command, a wildcard is the shell's."""
    if scheme(pattern) != "pipe" and REMOTE_WILDCARD.match(pattern):
        raise InputError(
            f"{key_name}: {shown(pattern)}: an address has no wildcards; use braces, as {{000000..000146}}"
        )


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


def _refuse_repeats(shards: Sequence[str], key_name: str) -> None:
    """A shard listed twice would silently weigh double."""
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise InputError(f"{key_name}: {shown(shard)} is named twice; every shard may appear once")
        seen.add(shard)
