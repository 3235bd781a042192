"""Named tensors in a folder, in the format of torch.distributed.checkpoint (DCP), for one process.

The folder holds tensors only: DCP would pickle anything else. Its `.metadata` is a pickle all the same: load
only folders you trust.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pretrain.errors import InputError

SHOWN = 3  # names of a kind in an error line


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any shape, dtype and device, bit for bit. Nothing is flushed to the disk.

    Raises:
        TypeError: a value is not a tensor.
        OSError: the disk is full, or the folder cannot be written.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"checkpoint tensor {name!r} is a {type(tensor).__name__}")
    writer = FileSystemWriter(folder, sync_files=False)
    with _alone():
        save(dict(tensors), storage_writer=writer, no_dist=True)


def load_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill the given tensors in place. Call `check_tensors` first: DCP converts another dtype without a word.

    Raises:
        InputError: a file is missing or damaged; some tensors may have been filled.
    """
    try:
        with _alone():
            load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=True)
    except Exception as error:  # a damaged file fails in whichever way its bytes lead to
        raise _damaged(folder, error) from error


def check_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes with those stored, reading no tensor.

    Raises:
        InputError: they differ, or the folder's metadata is missing or damaged.
    """
    stored = _stored(folder)
    wanted = {name: _kind(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    changed = [name for name in wanted if name in stored and wanted[name] != stored[name]]
    differences = [
        _listed("not in it", [name for name in wanted if name not in stored]),
        _listed("in it but not in the model", [name for name in stored if name not in wanted]),
        _listed("of another shape or type", [f"{n}: {stored[n]} stored, {wanted[n]} here" for n in changed]),
    ]
    if any(differences):
        text = "; ".join(filter(None, differences))
        raise InputError(
            f"{folder}: does not fit this configuration: {text}. Use the config.yaml of the run that wrote it"
        )


def _stored(folder: Path) -> dict[str, str]:
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:  # a damaged pickle fails in whichever way its bytes lead to
        raise _damaged(folder, error) from error
    return {
        name: _kind(tuple(entry.size), entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else "not a tensor"
        for name, entry in metadata.state_dict_metadata.items()
    }


def _kind(shape: tuple[int, ...], dtype: object) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more})"


def _damaged(folder: Path, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [""])[0]
    return InputError(
        f"{folder}: cannot be read ({type(error).__name__}: {reason}); continue from another checkpoint"
    )


@contextmanager
def _alone() -> Iterator[None]:
    """DCP for one process: no warning about that, and failures raised as what they are.

    DCP wraps every failure, Ctrl-C included, in a BaseException whose text is a traceback. A full disk is an
    OSError behind a RuntimeError of the zip writer.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
        try:
            yield
        except CheckpointException as error:
            raise _cause(next(iter(error.failures.values()))[0]) from None


def _cause(failure: BaseException) -> BaseException:
    link: BaseException | None = failure
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return failure
