"""docs/configuration.md, made from the schema: `python -m pretrain.config.docs`. No torch."""

import ast
import inspect
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from pretrain.config.schema import Config

INTRO = """# Configuration

Every setting of a run, made from `pretrain/config/schema.py` by `make docs`; do not edit it here.

A config file holds the sections below, and names the files it builds on with `base:` (a file or a list,
relative to it). Later sources win: the defaults, the base files in order, the file, then `key=value` on
the command line, where `key=` is empty text and `key=null` is null. A list setting also takes one value.
`${model.arch}` stands for another setting and `${oc.env:NAME}` for an environment variable. Unknown keys,
wrong types and contradictions are refused.

`python -m pretrain CONFIG --print-config` prints the complete config.
"""


def configuration_page() -> str:
    """The page as Markdown."""
    return "\n".join([INTRO, *_section(Config(), "")])


def main() -> None:
    """Write docs/configuration.md below the current folder, or the path given as argument."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/configuration.md")
    path.write_text(configuration_page(), encoding="utf-8")


def _section(section: Any, prefix: str) -> Iterator[str]:
    """Heading, docstring and table of a section, then its sub-sections."""
    hints, notes = get_type_hints(type(section)), _notes(type(section))
    names = [field.name for field in fields(section)]
    nested = [name for name in names if is_dataclass(getattr(section, name))]
    rows = [
        f"| `{prefix}{name}` | {_kind(hints[name])} | `{_default(getattr(section, name))}` | {notes[name]} |"
        for name in names
        if name not in nested
    ]
    if prefix:
        yield f"## {prefix.rstrip('.')}\n\n{inspect.getdoc(type(section))}\n"
    if rows:
        yield "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])
    for name in nested:
        yield from _section(getattr(section, name), f"{prefix}{name}.")
    for name in names:
        if item := _item_section(hints[name]):
            yield from _section(item(), f"{prefix}{name}.*.")


def _item_section(hint: Any) -> type | None:
    """The dataclass of a list's items, if they are of one."""
    item = get_args(hint)[0] if get_origin(hint) is list else None
    return item if isinstance(item, type) and is_dataclass(item) else None


def _notes(section: type) -> dict[str, str]:
    """The comment of each field, also of inherited ones; `|` is escaped for the table."""
    notes: dict[str, str] = {}
    for owner in reversed(section.__mro__[:-1]):
        notes |= _own_notes(owner)
    return {name: note.replace("|", "\\|") for name, note in notes.items()}


def _own_notes(section: type) -> dict[str, str]:
    """The comments behind the fields of a class, each with the comment lines that follow it."""
    source = inspect.getsource(section)
    comments = _comments(source)
    notes = {}
    for node in cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            notes[node.target.id] = " ".join(_run(comments, cast(int, node.end_lineno)))
    return notes


def _run(comments: dict[int, tuple[str, bool]], line: int) -> Iterator[str]:
    """The comment on a line and those alone on the lines right below it."""
    if line in comments:
        yield comments[line][0]
    while comments.get(line := line + 1, ("", False))[1]:
        yield comments[line][0]


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Text of each comment by line, and whether it is alone on its line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _kind(hint: Any) -> str:
    """A type in plain words."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if _item_section(hint):
        return "list of sections"
    if get_origin(hint) is list:
        return f"list of {_kind(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    options = get_args(hint)
    if options:
        return " or ".join("null" if option is type(None) else _kind(option) for option in options)
    return {str: "text", int: "integer", float: "number", bool: "true / false"}[hint]


def _default(value: Any) -> str:
    """A default as YAML would have it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_default, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value).replace("'", '"') if value == "" else str(value)


if __name__ == "__main__":
    main()
