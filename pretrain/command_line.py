"""What every command does with an error that a person is meant to read: one line on stderr, no traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from pretrain.errors import InputError, TrainingError, printable
from pretrain.redaction import show_unexpected, without_secrets

USAGE_ERROR = 2
TRAINING_ERROR = 3
STOPPED = 75  # a checkpoint was saved, the same command continues (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its complaints as `InputError`: one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint, with the way to the help."""
        raise InputError(f"command line: {message} ({self.prog} --help)")


def status_of(error: BaseException) -> int:
    """The exit status that an error ends its process with."""
    match error:
        case InputError() | OSError():
            return USAGE_ERROR
        case TrainingError():
            return TRAINING_ERROR
        case KeyboardInterrupt():
            return INTERRUPTED
        case SystemExit(code=int(code)):
            return code
        case _:
            return 1


def exit_status(program: str, command: Callable[[], int]) -> int:
    """The status of a command; wrong input and files that cannot be used end it with one line.

    An error that nobody expects passes through, and is shown by Python as always, but for secrets.
    """
    sys.excepthook = show_unexpected
    try:
        return command()
    except (InputError, OSError, TrainingError) as error:
        print(f"{program}:", without_secrets(printable(str(error))), file=sys.stderr)
        return status_of(error)
    except KeyboardInterrupt as error:
        print(f"{program}: interrupted", file=sys.stderr)
        return status_of(error)
