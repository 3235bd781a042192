"""The error that means: what the user gave is wrong, and one line says how."""


class InputError(ValueError):
    """Wrong input. The command line prints its text as one line and exits with status 2; no traceback."""
