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
