"""Tar shards that webdataset, img2dataset or we wrote, to be mixed anew. Any sample is one seek away."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.decode import check_image
from pretrain.data.inputs.classes import read_classes
from pretrain.data.inputs.groups import group_by_rule
from pretrain.data.inputs.listing import Listing
from pretrain.data.inputs.mixing import in_threads
from pretrain.data.inputs.source import (
    Encoded,
    Options,
    Result,
    Summary,
    Unreadable,
    describe,
)
from pretrain.data.members import CLASS_NUMBER, IMAGE_EXTENSIONS, key_and_extension
from pretrain.data.tar import Member, scan
from pretrain.errors import InputError
from pretrain.seeding import numpy_stream

PLACE = np.dtype([("offset", "<u8"), ("size", "<u8")])  # of a member's bytes; offset 0: there is none
KEPT = frozenset({"json", "cls"})  # beside the image

Places = np.ndarray[Any, np.dtype[np.void]]


@dataclass
class _Sample:
    """The members of one sample."""

    extension: str = ""
    places: dict[str, Member] = field(default_factory=dict)  # by image, json, cls
    seen: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Tars:
    """Samples of tars, all of them shuffled; about 70 bytes of memory each."""

    summary: Summary
    paths: Sequence[Path]
    places: Sequence[Places]  # of each tar's samples
    options: Options

    def read(self, numbers: Mapping[str, int]) -> Iterator[Result]:
        """Samples with the image's bytes, the label and the .json as they are."""
        ends = np.cumsum([len(places) for places in self.places])
        order = numpy_stream(self.options.seed, "pack").permutation(self.summary.images)
        return in_threads(partial(self._read, ends=ends), order)

    def _read(self, position: np.int64, ends: np.ndarray[Any, Any]) -> Result:
        tar = int(np.searchsorted(ends, position, side="right"))
        return _read(self.paths[tar], self.places[tar][int(position - ends[tar])], self.options)


def find(listing: Listing, options: Options) -> Tars:
    """The samples of tars; reads every header.

    Raises:
        InputError: a tar is damaged, a key does not match the rule for groups, or the tars' folders number
            their classes differently.
    """
    dropped: set[str] = set()
    paths = [file.path for file in listing.files]
    places = [_list_samples(path, options, dropped) for path in paths]
    names = ", ".join(f".{name}" for name in sorted(dropped))
    notes = (*listing.notes(), *([f"members that are not kept: {names}"] if dropped else []))
    order = f"order shuffled over {len(paths)} tars with seed {options.seed}"
    classes = tuple(_common_classes(paths))
    total = sum(map(len, places))
    summary = Summary(total, order, classes=classes, notes=notes, tars=tuple(paths))
    return Tars(summary, paths, places, options)


def _common_classes(paths: Iterable[Path]) -> list[str]:
    """The names of the classes, where we packed the tars."""
    files = sorted({path.parent / "classes.json" for path in paths})
    found = {tuple(read_classes(file)): file for file in files if file.exists()}
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise InputError(f"{one} and {other} number classes differently; pack them one after the other")
    return list(next(iter(found), ()))


def _list_samples(path: Path, options: Options, dropped: set[str]) -> Places:
    samples = _group(scan(path))
    if options.group_from:
        for key, _ in samples:  # now, not when half of the shards are written
            group_by_rule(options.group_from, key, path / key)
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in samples]
    width = max(map(len, keys), default=1)
    kinds = [(kind, PLACE) for kind in ("image", "json", "cls")]
    places = np.zeros(len(samples), np.dtype([("key", f"S{width}"), ("extension", "S5"), *kinds]))
    for row, name, (_, sample) in zip(places, keys, samples, strict=True):
        row["key"], row["extension"] = name, sample.extension.encode()
        for kind, member in sample.places.items():
            row[kind] = (member.offset, member.size)
        dropped |= sample.seen - KEPT - {sample.extension}
    return places


def _group(members: Iterable[Member]) -> list[tuple[str, _Sample]]:
    """Members by key; a member that comes again begins another sample of that key."""
    samples: list[tuple[str, _Sample]] = []
    latest: dict[str, _Sample] = {}
    for member in members:
        name = key_and_extension(member.name)
        if name is None:
            continue
        key, extension = name
        if key not in latest or extension in latest[key].seen:
            latest[key] = _Sample()
            samples.append((key, latest[key]))
        _add(latest[key], member, extension)
    return samples


def _add(sample: _Sample, member: Member, extension: str) -> None:
    sample.seen.add(extension)
    if extension in KEPT:
        sample.places[extension] = member
    elif extension in IMAGE_EXTENSIONS and not sample.extension:
        sample.places["image"], sample.extension = member, extension


def _read(path: Path, row: np.void, options: Options) -> Result:
    key = row["key"].decode("utf-8", "replace")
    name = f"{path.name}: {key}"
    if not row["extension"]:
        return Unreadable(name, "has no image")
    try:
        with path.open("rb") as file:
            image, notes, label = (_bytes(file, row[kind]) for kind in ("image", "json", "cls"))
        check_image(image)
        kept, number = _notes(notes), _label(label)
    except OSError as error:
        return Unreadable(name, error.strerror or str(error))
    except ValueError as error:
        return Unreadable(name, str(error))
    meta = {**describe(key, None, number, None), **kept}
    if options.group_from:
        meta["group"] = group_by_rule(options.group_from, key, path / key)
    return Encoded(row["extension"].decode(), image, number, meta)


def _bytes(file: Any, place: np.void) -> bytes:
    if not place["offset"]:
        return b""
    file.seek(int(place["offset"]))
    content: bytes = file.read(int(place["size"]))
    return content


def _notes(content: bytes) -> dict[str, Any]:
    if not content:
        return {}
    try:
        notes = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json cannot be read ({error})") from error
    if not isinstance(notes, dict):
        raise ValueError("its .json is not a set of keys and values")
    return notes


def _label(content: bytes) -> int | None:
    if not content:
        return None
    if not CLASS_NUMBER.fullmatch(content):
        raise ValueError(f"its .cls holds {content[:20]!r}, not a class number")
    return int(content)
