"""Which samples belong together, such as those of one patient: read from the samples' .json members."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.data.members import key_and_extension
from pretrain.data.shards import list_shards
from pretrain.data.tar import scan
from pretrain.errors import InputError


def sample_groups(patterns: Sequence[str], key_name: str, name: str) -> list[str]:
    """The group of each sample, in the order of the files, as `labelled_batches` reads them.

    Args:
        patterns: of the shards.
        key_name: the setting that holds them, for messages.
        name: the key in the .json members, such as patient.

    Raises:
        InputError: a sample has no .json member, or no such key in it.
    """
    groups: list[str] = []
    for shard in list_shards(patterns, key_name):
        for key, meta in _metas(shard).items():
            if not isinstance(meta, dict) or name not in meta:
                raise InputError(f"{key_name}: {shard}: sample {key} has no {name!r} in a .json member")
            groups.append(str(meta[name]))
    return groups


def _metas(shard: Path) -> dict[str, Any]:
    """The .json member of each sample, None without, in the order of the tar."""
    found: dict[str, Any] = {}
    try:
        with shard.open("rb") as file:
            for member in scan(shard):
                parts = key_and_extension(member.name)
                if parts is None:
                    continue
                found.setdefault(parts[0], None)
                if parts[1] == "json":
                    file.seek(member.offset)
                    found[parts[0]] = json.loads(file.read(member.size))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{shard}: its .json members cannot be read ({error})") from error
    return found
