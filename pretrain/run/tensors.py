"""Named tensors in a folder, in the format of torch.distributed.checkpoint (DCP).

The folder holds tensors only: DCP would pickle anything else. Its `.metadata` is a pickle all the same, read
without running code from it.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import add, lt
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pretrain.errors import InputError
from pretrain.run.tensor_metadata import SafeReader

SHOWN = 3  # names of a kind in an error line


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write tensors of any shape, dtype and device, bit for bit; each rank flushes its files to the disk.

    Collective over `group`; None = this process alone. A plain tensor is given by one rank, a distributed one
    by all that hold a part of it.

    Raises:
        OSError: on every rank, when on one of them the disk is full or the folder cannot be written.
    """
    with _own_failures():
        save(dict(tensors), storage_writer=_Writer(folder), process_group=group, no_dist=group is None)


def load_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill the given tensors in place, of distributed ones the part that this rank holds. Not collective.

    Call `check_tensors` first: DCP converts another dtype without a word.

    Raises:
        InputError: a file is missing or damaged; some tensors may have been filled.
    """
    try:
        with _own_failures():
            load(dict(tensors), storage_reader=SafeReader(folder), no_dist=True)
    except Exception as error:  # a damaged file fails in whichever way its bytes lead to
        raise _damaged(folder, error) from error


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names begin with `prefix`, by the rest of the name, on the CPU.

    Raises:
        InputError: a file is missing or damaged.
    """
    entries = {
        name: entry
        for name, entry in _entries(folder).items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    for name, entry in entries.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel() or _overlap(entry.chunks):
            raise _damaged(folder, ValueError(f"{name} is not stored whole"))
    _check_bytes(folder, entries)
    tensors = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    load_tensors(folder, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether two parts of a tensor share a value; another one would then stay as memory happened to be."""
    filled = [chunk for chunk in chunks if chunk.sizes.numel()]
    parts = sorted((tuple(c.offsets), tuple(map(add, c.offsets, c.sizes))) for c in filled)
    for i, (low, high) in enumerate(parts):
        for other_low, other_high in parts[i + 1 :]:
            if other_low[:1] >= high[:1]:
                break  # nor does any that follows: they are sorted by their first rows
            if all(map(lt, other_low, high)) and all(map(lt, low, other_high)):
                return True
    return False


def _check_bytes(folder: Path, entries: Mapping[str, TensorStorageMetadata]) -> None:
    """Refuse metadata that claims more bytes than the files hold, before memory is taken for them."""
    claimed = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries.values())
    there = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if claimed > there:
        raise _damaged(folder, ValueError(f"{claimed:,} bytes of tensors in files of {there:,} bytes"))


def kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Dtype and (whole) shape of each tensor.

    Raises:
        TypeError: a value is not a tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"checkpoint tensor {name!r} is a {type(tensor).__name__}")
    return {name: _kind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def check_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare names, whole shapes and dtypes with those stored, reading no tensor.

    Raises:
        InputError: they differ, or the folder's metadata is missing or damaged.
    """
    stored = _stored(folder)
    wanted = kinds(tensors)
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
    return {
        name: _kind(tuple(entry.size), entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else "not a tensor"
        for name, entry in _entries(folder).items()
    }


def _entries(folder: Path) -> dict[str, STORAGE_TYPES]:
    try:
        return SafeReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle fails in whichever way its bytes lead to
        raise _damaged(folder, error) from error


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


class _Writer(FileSystemWriter):
    """Writes one file a rank and flushes it."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As the base class; a full disk, there a RuntimeError of the zip writer, is the OSError behind it.

        It must be found here: an error that goes to another rank leaves its causes behind.
        """
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _cause(error) from None


@contextmanager
def _own_failures() -> Iterator[None]:
    """DCP's failures as what they are: it wraps each, Ctrl-C included, in a BaseException with a traceback.

    A failure of one rank is raised by all. The filter stays: to take it back in a thread would undo what the
    main thread does with filters at the same time.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
    try:
        yield
    except CheckpointException as error:
        raise _cause(error.failures[min(error.failures)][0]) from None


def _cause(failure: BaseException) -> BaseException:
    link: BaseException | None = failure
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return failure
