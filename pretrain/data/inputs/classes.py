"""Class names and their numbers, kept in `classes.json` beside the shards."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pretrain.data.inputs.source import Summary
from pretrain.errors import InputError

MAX_NUMBERED_CLASSES = 100_000  # larger numbers are names


def list_classes(label_names: Iterable[str]) -> list[str]:
    """Class names in the order of their numbers: sorted, or 0 to the largest where all are numbers."""
    names = sorted(set(label_names))
    numbered = all(name.isdecimal() and str(int(name)) == name for name in names)
    if names and numbered and int(max(names, key=int)) < MAX_NUMBERED_CLASSES:
        return [str(i) for i in range(max(map(int, names)) + 1)]
    return names


def agree_on_classes(found: Summary, known: Sequence[str] | None) -> list[str]:
    """Class names in the order of their numbers.

    Args:
        found: in the input.
        known: of the shards that are there already; None = there are none.

    Raises:
        InputError: a class is not among the known ones, or the input's numbers mean other classes.
    """
    if known is None:
        return list(found.classes) or list_classes(found.label_names)
    if found.classes and list(found.classes) != list(known):
        raise InputError(
            "the class numbers of the input have other names than those in the classes.json of the shards; "
            "pack to another folder"
        )
    unknown = sorted(found.label_names - set(known))
    if unknown:
        raise InputError(f"class {unknown[0]} is not in the classes.json of the shards")
    return list(known)


def read_classes(path: Path) -> list[str]:
    """Class names in the order of their numbers, as an earlier run wrote them.

    Raises:
        InputError: the file holds something else.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(names, list):
            raise ValueError(f"it holds one {type(names).__name__}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a list of class names ({error}); repair or remove it") from error
    return [str(name) for name in names]


def write_classes(path: Path, classes: Sequence[str]) -> None:
    """Write class names in the order of their numbers."""
    text = json.dumps(list(classes), indent=0, ensure_ascii=False) + "\n"
    # a folder's name may hold bytes of no letter: so escaped, they are what JSON has for them
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
