"""Settings as YAML gives them in the shape of the schema; unknown keys and wrong shapes are refused."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from pretrain.config.keys import settings
from pretrain.config.schema import Config

FROM_ENVIRONMENT = re.compile(r"oc\.env:\s*([^,}]*)")
SECRET = re.compile(r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(^|_)KEY($|_)|(^|_)PWD$", re.IGNORECASE)


def fit(content: Mapping[Any, Any], section: type, prefix: str = "") -> dict[str, Any]:
    """`content` with a lone value for a list made a list.

    Raises:
        ValueError: a key or a shape is unknown to `section`; `section.key: what is wrong`.
    """
    hints = get_type_hints(section)
    for name in content:
        if name not in hints:
            raise ValueError(f"{prefix}{name}: no such key{_suggest(str(name), hints, prefix)}")
    return {name: _fit_value(value, hints[name], f"{prefix}{name}") for name, value in content.items()}


def _fit_value(value: Any, kind: Any, key: str) -> Any:
    """One setting in the shape of its type; scalars are left to OmegaConf."""
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            known = ", ".join(get_type_hints(kind))
            raise ValueError(f"{key}: is a section with the keys {known}; got {value!r}")
        return fit(value, cast(type, kind), f"{key}.")
    if isinstance(value, str):
        _check_text(value, key)
        if "${" in value and not _holds_sections(kind):
            return value  # resolved when all sources are merged
    if get_origin(kind) is dict:
        return _fit_mapping(value, key)
    options = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if value is None and NoneType in options:
        return None
    for option in options:
        if get_origin(option) is list:
            return _fit_list(value, get_args(option)[0], key)
    if isinstance(value, Mapping | list):
        raise ValueError(f"{key}: needs one value, got {value!r}")
    if key == "cluster.time" and not isinstance(value, str):
        raise ValueError(f"{key}: write it in quotes, as '1:30:00'; without them YAML reads that as 5400")
    return value


def _check_text(value: str, key: str) -> None:
    if value == "???":  # OmegaConf would drop it without a word
        raise ValueError(f"{key}: ??? stands for a missing value; give one")
    if "\0" in value:  # no path or option can hold one
        raise ValueError(f"{key}: holds a zero byte; remove it")
    for name in FROM_ENVIRONMENT.findall(value):
        if SECRET.search(name):
            raise ValueError(
                f"{key}: would write the secret in ${name} into the run's config.yaml; let a program "
                "read it: pipe:COMMAND with $NAME, ~/.netrc, or the store's own credentials"
            )


def _holds_sections(kind: Any) -> bool:
    """Whether a list is one of sections."""
    return get_origin(kind) is list and is_dataclass(get_args(kind)[0])


def _fit_list(value: Any, item_kind: Any, key: str) -> list[Any]:
    """A list, or one value as a list of one; OmegaConf would take a list for a number in it."""
    if value is None or (isinstance(value, Mapping) and not is_dataclass(item_kind)):
        raise ValueError(f"{key}: needs a list, for example [a, b]; got {value!r}")
    items = value if isinstance(value, list) else [value]
    if is_dataclass(item_kind):
        return [_fit_value(item, item_kind, f"{key}[{i}]") for i, item in enumerate(items)]
    if item_kind in (str, int, float) and any(isinstance(item, Mapping | list) for item in items):
        raise ValueError(f"{key}: needs a list of single values; got {value!r}")
    for item in items:
        if isinstance(item, str):
            _check_text(item, key)
    return items


def _fit_mapping(value: Any, key: str) -> Any:
    """Free settings of another program: any names, any depth."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: needs a mapping of names to values; got {value!r}")
    return value


def _suggest(name: str, known: Mapping[str, Any], prefix: str) -> str:
    """What the user may have meant by a key: a near name in the section, or the same name in another."""
    near = [f"{prefix}{match}" for match in difflib.get_close_matches(name, known, n=1)]
    near = near or [key for key in settings(Config()) if key.rpartition(".")[2] == name]
    return f"; did you mean {' or '.join(near)}?" if near else f"; known here: {', '.join(known)}"
