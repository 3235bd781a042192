"""The dotted keys of a config: `optim.lr` for the field `lr` of section `optim`. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pretrain.config.schema import Config


def settings(cfg: Config) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return dict(flatten(asdict(cfg)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings with their dotted keys."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:  # an empty one is a value: no free settings
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
