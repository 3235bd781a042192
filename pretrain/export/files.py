"""Opens a file of weights of any program by what it holds, never by its name. Tensors are mapped, not read.

A pickle is read by torch's restricted unpickler alone: one that wants to run code is refused.
"""

import argparse
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pretrain.errors import InputError, first_line
from pretrain.export.own import ENTRY, FORMAT, map_safetensors, parse_description, what_it_is
from pretrain.run.refused_pickle import wanted_global

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before torch 1.6
TORCH_FILE = "file of torch.save"
MAX_ENTRIES = 300_000  # of nested dicts and lists: a pickle can name one list in many places
MAX_HEADER = 100 << 20  # bytes of a safetensors header, the format's own limit


@dataclass(frozen=True)
class Contents:
    """What a file or folder of weights holds."""

    kind: str  # of the file, in words
    tensors: dict[str, Tensor]  # flat: names of nested dicts joined by dots
    description: dict[str, Any] = field(default_factory=dict)  # what travels with our own weights
    described_by: str = ""  # where the description stands
    config: dict[str, Any] = field(default_factory=dict)  # a model folder's config.json


def open_file(path: Path) -> Contents:
    """The tensors of one file: safetensors, or what torch.save wrote of tensors in dicts.

    Raises:
        InputError: the file is missing, cut short, something else than weights, or wants to run code.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < MAX_HEADER:  # first: any byte may begin it
        return _safetensors_file(path)
    if start.startswith((ZIP, LEGACY)):
        return _torch_file(path, mapped=start.startswith(ZIP))
    if start.startswith(PICKLE):
        raise InputError(f"{path}: a pickle that torch.save did not write: refused, it could run code")
    if not start:
        raise InputError(f"{path}: is empty")
    raise InputError(f"{path}: {what_it_is(path, 'and not one of torch.save')}")


def _safetensors_file(path: Path) -> Contents:
    try:
        metadata, tensors = map_safetensors(path)
    except (OSError, SafetensorError, AttributeError) as error:  # a type that this torch lacks: the last
        raise InputError(f"{path}: not a complete safetensors file ({error})") from error
    description = parse_description(path, metadata) if ENTRY in metadata else {}
    return Contents("safetensors file", tensors, description, "its metadata")


def _torch_file(path: Path, mapped: bool) -> Contents:
    if mapped:
        _refuse_bomb(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an archive of TorchScript is refused, not warned of
            found = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # a damaged file fails in whichever way its bytes lead to
        raise InputError(f"{path}: {_why(error)}") from error
    try:
        tensors = dict(_tensors(found))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: its dicts and lists are nested without end") from error
    if not tensors:
        raise InputError(f"{path}: holds no tensors, but a {type(found).__name__}")
    return Contents(TORCH_FILE, tensors, _beside(path), str(path.with_suffix(".json")))


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive whose parts would be larger than itself: torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: cut short, damaged or no state dict ({first_line(error)})") from error
    if claimed > path.stat().st_size:
        raise InputError(f"{path}: an archive of {claimed:,} bytes when unpacked; torch.save packs nothing")


def _why(error: Exception) -> str:
    wanted = wanted_global(error)
    if wanted and wanted.startswith(("torch.distributed", "torch.nn")):
        return f"holds {wanted} objects instead of tensors; save a state dict of whole tensors"
    if wanted:
        return (
            f"a pickle that wants to run {wanted}: refused. If you trust it, save its tensors alone "
            "where it was made"
        )
    if isinstance(error, pickle.UnpicklingError):
        return f"a pickle that is no state dict ({first_line(error)})"
    return f"cut short, damaged or no state dict ({first_line(error)})"


def _tensors(found: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts and lists; everything else is left."""
    for count, (name, value) in enumerate(_flat(found, "")):
        if count == MAX_ENTRIES:
            raise InputError(f"holds more than {MAX_ENTRIES:,} entries")
        if isinstance(value, Tensor):
            _check_plain(name, value)
            yield name, value.detach()


def _flat(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    """Every entry of nested dicts and lists, itself first."""
    yield prefix, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}.{index}" if prefix else str(index))


def _check_plain(name: str, tensor: Tensor) -> None:
    """Refuse what is no array of numbers in memory."""
    odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta
    if odd or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise InputError(f"{name} is no plain tensor (sparse, quantized, without data, or repeated)")


def _beside(path: Path) -> dict[str, Any]:
    """The description that we write beside a .pth file."""
    beside = path.with_suffix(".json")
    try:
        found = json.loads(beside.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(found, dict) and found.get("format") == FORMAT
    ours = ours and found.get("bytes") == path.stat().st_size  # else it belongs to another file of that name
    return parse_description(beside, {ENTRY: json.dumps(found)}) if ours else {}
