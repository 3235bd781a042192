"""The group of a sample by a rule on its name (`--group-from`)."""

import re
from pathlib import PurePath

from pretrain.errors import InputError


def group_by_rule(rule: str, name: str, path: PurePath) -> str:
    """The parent folder's name (`parent`), or what an expression finds in the name.

    That is the first group of the expression, or all of what it matches where it has none.

    Raises:
        InputError: the expression is not valid, or finds nothing in the name.
    """
    if rule == "parent":
        return path.parent.name
    try:
        expression = re.compile(rule)  # re keeps the last ones compiled
    except re.error as error:
        raise InputError(f"--group-from {rule}: not a regular expression: {error}") from error
    match = expression.search(name)
    if match is None:
        raise InputError(f"--group-from {rule}: does not match {name}")
    found: str | None = match[min(expression.groups, 1)]
    if found is None:
        raise InputError(f"--group-from {rule}: its first group takes no part in the match with {name}")
    return found
