"""Libraries that only one kind of input needs; they are not among the dependencies of a training run."""

from importlib import import_module
from typing import Any

from pretrain.errors import InputError


def load_library(module: str) -> Any:
    """An optional library's module, such as `pyarrow.parquet`.

    Raises:
        InputError: the library is not installed, or not in working order.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"needs {package}: pip install {package}") from error
    except ImportError as error:
        raise InputError(f"needs {package}, which is damaged ({error}): pip install {package}") from error
