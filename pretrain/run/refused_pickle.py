"""What torch's restricted unpickler did not want to run."""

import re

# it has several wordings; each names a class or function with its module
WANTED = re.compile(r"(?:GLOBAL|Unsupported global:|Unsupported class) ?(?:GLOBAL )?([\w.]+\.\w+)")


def wanted_global(error: BaseException) -> str | None:
    """The class or function that a pickle wants, as in `posix.system`; None for errors of another kind."""
    found = WANTED.search(str(error))
    return found[1] if found else None
