"""Lines for logs and files without the secrets that stand in them. No torch.

Errors of clients repeat addresses and commands as they were given, so every line and traceback passes here
on its way out. Taken for a secret are `user:password@` of an address, long parameters (signatures), and the
values of names such as TOKEN, SECRET, PASSWORD or KEY, in parameters, assignments, options and headers.
"""

import re
import sys
import traceback
from types import TracebackType

PASSWORD = re.compile(r"(://)[^/\s]*@")  # up to the last @ before the path: a password may hold one
LONG_VALUE = re.compile(r"([?&][^=&\s]*=)[^&\s'\"]{13,}")  # of a parameter: a signature or a token
NAME = (
    "(?:token|secret|passw(?:or)?d|passphrase|credentials?|signature|pwd|(?:api|access)[_-]?key(?:[_-]?id)?)"
)
NAMED = re.compile(  # a sign or an option tells them from words of a sentence
    rf"(?i)([\w-]*{NAME}=['\"]?|(?<!\S)--{NAME} +['\"]?"
    r"|\bbearer +|\bauthorization: *basic +|(?<!\S)(?:-u|--user)[ =]?[^\s:]+:)(?!\.{3})[^&\s'\",;)]+"
)
KEY_VARIABLE = re.compile(r"(\b[A-Z][A-Z0-9_]*_KEY=['\"]?)(?!\.{3})[^&\s'\",;)]+")
PATTERNS = (PASSWORD, LONG_VALUE, NAMED, KEY_VARIABLE)


def without_secrets(text: str) -> str:
    """The text, `...` in the place of each secret; of an address user and password are left out."""
    for pattern in PATTERNS:
        text = pattern.sub(r"\1" if pattern is PASSWORD else r"\1...", text)
    return text


def holds_secret(text: str) -> bool:
    """Whether a text is to be read by its owner alone."""
    return without_secrets(text) != text


def show_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback without secrets: a `sys.excepthook`."""
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
