"""Image files to pack: found in a folder or named in a list, with labels and groups, checked by decoding."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pretrain.data.decode import check_image
from pretrain.data.index import IMAGE_EXTENSIONS
from pretrain.data.writer import PackedSample
from pretrain.errors import InputError
from pretrain.seeding import numpy_stream

MAX_NUMBERED_CLASSES = 100_000  # larger numbers are names
CHUNK = 256  # files read and decoded ahead
THREADS = 8  # that decode; the decoders release the interpreter lock
IMAGE_NAMES = ", ".join(sorted(IMAGE_EXTENSIONS))


@dataclass(frozen=True)
class Source:
    """One image file."""

    path: Path
    name: str  # as in the folder or the list; kept in the sample's .json
    label_name: str | None = None
    label: int | None = None
    group: str | None = None  # what must not be split, such as a patient or a video


class Found(NamedTuple):
    """What there is to pack."""

    sources: list[Source]
    others: list[str]  # files of the folder that are no images by their name


def find_sources(src: Path) -> Found:
    """The images of a folder or of a list file.

    A folder holds images, or one sub-folder per class. A list has a path per line, from its own folder unless
    absolute, and may go on with a tab and a label, a tab and a group.

    Raises:
        InputError: nothing is found, or the labels are unclear; names the file or line.
    """
    if src.is_dir():
        return _from_folder(src)
    if src.is_file():
        return Found(_from_list(src), [])
    raise InputError(f"{src}: no such folder or list of images")


def _from_folder(src: Path) -> Found:
    walk = os.walk(src, followlinks=True)  # class folders are often links
    paths = sorted(Path(folder, name) for folder, _, names in walk for name in names)
    files = [path for path in paths if not any(part[0] == "." for part in path.relative_to(src).parts)]
    images = [path for path in files if _has_image_name(path)]
    flat = [path for path in images if path.parent == src]
    if not images:
        raise InputError(f"{src}: holds no image ({IMAGE_NAMES})")
    if flat and len(flat) < len(images):
        raise InputError(f"{src}: holds images and sub-folders with images; move {flat[0].name} and its like")
    names = [path.relative_to(src) for path in images]
    sources = [Source(src / name, name.as_posix(), None if flat else name.parts[0]) for name in names]
    return Found(sources, [str(path.relative_to(src)) for path in files if not _has_image_name(path)])


def _has_image_name(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS


def _from_list(src: Path) -> list[Source]:
    try:
        lines = src.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{src}: neither a folder nor a text file with a path per line") from error
    sources = [_from_line(src, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not sources:
        raise InputError(f"{src}: names no image")
    unlabelled = sum(source.label_name is None for source in sources)
    if 0 < unlabelled < len(sources):
        raise InputError(
            f"{src}: {unlabelled} of {len(sources)} lines have no label; label all lines or none"
        )
    return sources


def _from_line(src: Path, number: int, line: str) -> Source:
    name, *rest = line.split("\t")
    path = src.parent / name  # an absolute name stays as it is
    if len(rest) > 2:
        raise InputError(f"{src}: line {number}: more than path, label and group between tabs")
    if not _has_image_name(path):
        raise InputError(f"{src}: line {number}: {name} is not named like an image ({IMAGE_NAMES})")
    label, group = (*rest, "", "")[:2]
    return Source(path, name, label or None, None, group or None)


def list_classes(sources: Sequence[Source]) -> list[str]:
    """Class names in the order of their numbers: sorted, or 0 to the largest where all are numbers."""
    names = sorted({source.label_name for source in sources if source.label_name is not None})
    numbered = all(name.isdecimal() and str(int(name)) == name for name in names)
    if names and numbered and int(max(names, key=int)) < MAX_NUMBERED_CLASSES:
        return [str(i) for i in range(max(map(int, names)) + 1)]
    return names


def add_labels(sources: Sequence[Source], classes: Sequence[str]) -> list[Source]:
    """Sources with the numbers of their classes.

    Raises:
        InputError: a class is not among `classes`.
    """
    numbers: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    for source in sources:
        if source.label_name is not None and source.label_name not in numbers:
            raise InputError(
                f"{source.name}: class {source.label_name} is not in the classes.json of the shards"
            )
    return [replace(source, label=numbers.get(source.label_name)) for source in sources]


def add_groups(sources: Sequence[Source], rule: str) -> list[Source]:
    """Sources with groups: the parent folder's name (`parent`), or what an expression finds in the name.

    Raises:
        InputError: the expression is not valid, or a name does not match it.
    """
    if rule == "parent":
        return [replace(source, group=source.path.parent.name) for source in sources]
    try:
        expression = re.compile(rule)
    except re.error as error:
        raise InputError(f"--group-from {rule}: not a regular expression: {error}") from error
    return [replace(source, group=_find_group(expression, source.name)) for source in sources]


def _find_group(expression: re.Pattern[str], name: str) -> str:
    """The first group of the expression, or all of what it matches where it has none."""
    match = expression.search(name)
    if match is None:
        raise InputError(f"--group-from {expression.pattern}: does not match {name}")
    return str(match[min(expression.groups, 1)])


def shuffle_sources(sources: Sequence[Source], seed: int) -> list[Source]:
    """Sources in a random order: block shuffling cannot undo sorted classes."""
    return [sources[i] for i in numpy_stream(seed, "pack").permutation(len(sources))]


def read_sources(sources: Sequence[Source], unreadable: list[str]) -> Iterator[PackedSample]:
    """Samples of the files that decode, in order; others get a line (name, tab, reason) in `unreadable`."""
    number = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(sources), CHUNK):
            chunk = sources[start : start + CHUNK]
            for source, content in zip(chunk, pool.map(_read, chunk), strict=True):
                if isinstance(content, str):
                    unreadable.append(f"{source.name}\t{content}")
                else:
                    yield _sample(source, content, number)
                    number += 1


def _read(source: Source) -> bytes | str:
    """The file's bytes, or why they are not an image."""
    try:
        content = source.path.read_bytes()
        check_image(content)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return content


def _sample(source: Source, content: bytes, number: int) -> PackedSample:
    names = {"source": source.name, "label_name": source.label_name, "group": source.group}
    extension = source.path.suffix[1:].lower()
    return PackedSample(f"{number:09d}", extension, content, source.label, {**names, "label": source.label})
