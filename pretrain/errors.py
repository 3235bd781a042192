"""The errors that a person is meant to read: each is shown as one line, without a traceback."""


class InputError(ValueError):
    """Wrong input: a config, a file or the command line. Exit status 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on, although everything it was given is well-formed. Exit status 3."""


class LostPeerError(TrainingError):
    """Another rank has ended without a word, or does not answer: a consequence of the failure."""


def first_line(error: BaseException) -> str:
    """What an error says, for a line: its first line, or its kind where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """Text as one line for a terminal or a log.

    Names in files of others may hold line breaks, sequences that steer a terminal, and bytes of no letter:
    these are shown as in a Python string.
    """
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
