"""Reads the `.metadata` of a torch.distributed.checkpoint (DCP) folder without running code from it.

DCP writes that file as a pickle and reads it with `pickle.load`, which runs whatever the file says. Here only
the plain classes that describe tensors may appear in it.
"""

import pickle
from pathlib import Path, PosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

DESCRIPTIONS = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
)


class UnsafeMetadataError(pickle.UnpicklingError):
    """The file names something that no description of tensors needs."""


class _Unpickler(pickle.Unpickler):
    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        **{(kind.__module__, kind.__qualname__): kind for kind in DESCRIPTIONS},
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("pathlib", "PosixPath"): PosixPath,
        ("collections", "OrderedDict"): dict,
    }

    def find_class(self, module: str, name: str) -> Any:
        """A class of the list, or one of torch's dtypes."""
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            return found
        raise UnsafeMetadataError(f"it is a pickle that wants to run {module}.{name}")


class SafeReader(FileSystemReader):
    """DCP's reader of a folder, for folders that come from anyone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As the base class.

        Raises:
            UnsafeMetadataError: the file names another class or function than those of a description, or
                what it says of a tensor is none.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
            raise UnsafeMetadataError(f"it holds a {type(found).__name__} instead of DCP's metadata")
        for name, entry in found.state_dict_metadata.items():
            if not isinstance(name, str) or not _is_description(entry):
                raise UnsafeMetadataError(f"its entry {name!r} describes no tensor")
        for place in (found.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise UnsafeMetadataError(f"it names the file {place.relative_path!r} outside of the folder")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As the base class, for tensors alone: an object would be unpickled.

        Raises:
            UnsafeMetadataError: one of the wanted items is no tensor in the folder.
        """
        for item in plan.items:
            if item.type is not LoadItemType.TENSOR:
                raise UnsafeMetadataError(f"{item.storage_index.fqn} is stored as a pickle, not as a tensor")
        return super().read_data(plan, planner)


def _is_description(entry: STORAGE_TYPES) -> bool:
    """Whether all parts of an entry are of the types that they should be; unpickling sets anything."""
    if isinstance(entry, BytesStorageMetadata):
        return True
    return (
        isinstance(entry, TensorStorageMetadata)
        and isinstance(entry.properties, TensorProperties)
        and isinstance(entry.properties.dtype, torch.dtype)
        and _is_size(entry.size)
        and isinstance(entry.chunks, list)
        and all(map(_is_chunk, entry.chunks))
    )


def _is_chunk(chunk: ChunkStorageMetadata) -> bool:
    return isinstance(chunk, ChunkStorageMetadata) and _is_size(chunk.sizes) and _is_size(chunk.offsets)


def _is_size(size: torch.Size) -> bool:
    return isinstance(size, torch.Size) and all(number >= 0 for number in size)
