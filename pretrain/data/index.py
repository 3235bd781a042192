"""The index beside each shard (`x.tar.idx`): one fixed-size record per sample. No torch.

Any sample is one seek away, and since the index is memory-mapped, a billion samples cost no memory. The file
is a header (magic, bytes of a key, bytes of the tar, samples) and the records, little-endian. It is used as
long as its shard has the size written in it and is not newer than it.
"""

import io
import os
import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pretrain.data.tar import Member, scan
from pretrain.errors import InputError

MAGIC = b"PTINDEX1"
HEADER = struct.Struct("<8sIIQQ")  # magic, bytes of a key, unused, bytes of the tar, samples
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key, extension
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm"})
NO_LABEL = -1

Records = np.ndarray[Any, np.dtype[np.void]]


def record_type(key_bytes: int) -> np.dtype[np.void]:
    """The layout of a record whose key has at most `key_bytes` bytes."""
    fields = [
        ("key", f"S{key_bytes}"),
        ("offset", "<u8"),  # of the image's bytes in the tar
        ("size", "<u4"),
        ("extension", "S5"),
        ("width", "<u4"),  # pixels, as stored (no EXIF rotation)
        ("height", "<u4"),
        ("crc32", "<u4"),  # of the image's bytes
        ("json_offset", "<u8"),  # 0: no .json member
        ("json_size", "<u4"),
        ("label", "<i8"),  # NO_LABEL: no .cls member
    ]
    return np.dtype(fields)


@dataclass
class _Members:
    """The members of one sample that the index knows about."""

    image: Member | None = None
    extension: str = ""
    json: Member | None = None
    label: int = NO_LABEL
    seen: set[str] = field(default_factory=set)


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(f"{shard.name}.idx")


def ensure_index(shard: Path) -> int:
    """Build the index of a shard unless a valid one lies beside it; the number of samples.

    Raises:
        InputError: the shard is damaged, or its folder is not writable.
    """
    samples = indexed_samples(shard)
    return build_index(shard) if samples is None else samples


def indexed_samples(shard: Path) -> int | None:
    """Samples in the index of a shard; None where it is missing, of another version, or not of this tar."""
    try:
        with index_path(shard).open("rb") as file:
            header, index = file.read(HEADER.size), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    if len(header) < HEADER.size:
        return None
    magic, key_bytes, _, tar_size, samples = HEADER.unpack(header)
    tar = shard.stat()
    if magic != MAGIC or tar_size != tar.st_size or index.st_mtime_ns < tar.st_mtime_ns:
        return None
    complete = index.st_size == HEADER.size + samples * record_type(key_bytes).itemsize
    return int(samples) if complete else None


def open_index(shard: Path) -> Records:
    """The records of a shard's index, memory-mapped; `ensure_index` must have run."""
    with index_path(shard).open("rb") as file:
        _, key_bytes, _, _, samples = HEADER.unpack(file.read(HEADER.size))
    kind = record_type(key_bytes)
    if not samples:
        return np.empty(0, kind)
    return np.memmap(index_path(shard), dtype=kind, mode="r", offset=HEADER.size, shape=(samples,))


def build_index(shard: Path, target: Path | None = None) -> int:
    """Scan a shard and write its index, beside it or at `target`; the number of samples.

    Raises:
        InputError: the shard is damaged, a sample has no image or one member twice, or the folder is not
            writable.
    """
    with shard.open("rb") as file:
        tar_size = os.fstat(file.fileno()).st_size
        groups = _group(scan(shard), file.fileno(), shard)
        records = _records(groups, file.fileno(), shard)
    header = HEADER.pack(MAGIC, records.dtype["key"].itemsize, 0, tar_size, len(records))
    _write(target or index_path(shard), header + records.tobytes())
    return len(records)


def _group(members: Iterable[Member], descriptor: int, shard: Path) -> dict[str, _Members]:
    """Members by key, in the order in which keys first appear; samples may be interleaved."""
    groups: dict[str, _Members] = {}
    for member in members:
        match = MEMBER_NAME.fullmatch(member.name)
        if match is None or re.fullmatch(
            r"__[^/]*__", member.name
        ):  # no key, or webdataset's shard-wide notes
            continue
        key, extension = match[1], match[2].lower()
        sample = groups.setdefault(key, _Members())
        if extension in sample.seen:
            raise InputError(
                f"{shard}: byte {member.offset}: {member.name} is in the shard twice; re-pack it"
            )
        sample.seen.add(extension)
        _add(sample, member, extension, descriptor, shard)
    return groups


def _add(sample: _Members, member: Member, extension: str, descriptor: int, shard: Path) -> None:
    if extension in IMAGE_EXTENSIONS and sample.image is None:
        sample.image, sample.extension = member, extension
    elif extension == "json":
        sample.json = member
    elif extension == "cls":
        content = os.pread(descriptor, member.size, member.offset)
        if not re.fullmatch(rb"\s*[0-9]+\s*", content):
            raise InputError(
                f"{shard}: byte {member.offset}: {member.name} holds {content[:20]!r}, not a class number"
            )
        sample.label = int(content)


def _records(groups: dict[str, _Members], descriptor: int, shard: Path) -> Records:
    keys = [key.encode("utf-8", "surrogateescape") for key in groups]
    records = np.zeros(len(keys), record_type(max(map(len, keys), default=1)))
    for i, (key, sample) in enumerate(zip(keys, groups.values(), strict=True)):
        records[i] = _record(key, sample, descriptor, shard)
    return records


def _record(key: bytes, sample: _Members, descriptor: int, shard: Path) -> tuple[Any, ...]:
    name = key.decode("utf-8", "replace")
    image = sample.image
    if image is None:
        raise InputError(
            f"{shard}: sample {name} has no image, only {', '.join(sorted(sample.seen))} "
            f"(images: {', '.join(sorted(IMAGE_EXTENSIONS))})"
        )
    content = os.pread(descriptor, image.size, image.offset)
    try:
        width, height = image_size(content)
    except ValueError as error:
        raise InputError(
            f"{shard}: byte {image.offset}: {image.name}: {error}; re-pack without it"
        ) from error
    json_place = (sample.json.offset, sample.json.size) if sample.json else (0, 0)
    place = (image.offset, image.size, sample.extension.encode())
    return (key, *place, width, height, zlib.crc32(content), *json_place, sample.label)


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) in pixels from an image's header.

    Raises:
        ValueError: the bytes are not an image.
    """
    if content[:2] == b"\xff\xd8":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
        except ValueError:
            pass  # Pillow accepts more
        else:
            return width, height
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise ValueError("not an image in a known format") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def _write(path: Path, content: bytes) -> None:
    """Write under a temporary name and rename: several ranks may build the same index at once."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot write the index ({error.strerror}); make the folder writable or run "
            f"`python tools/pack.py --index {path.with_suffix('')}` where it is"
        ) from error
