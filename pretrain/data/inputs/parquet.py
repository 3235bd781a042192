"""Parquet files with a column of encoded images, as on the Hugging Face hub. Read in batches of rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.decode import check_image
from pretrain.data.inputs.columns import Columns, find_columns, open_table
from pretrain.data.inputs.groups import group_by_rule
from pretrain.data.inputs.listing import Listing
from pretrain.data.inputs.mixing import BLOCK_BYTES, in_threads, mix, shuffled
from pretrain.data.inputs.source import (
    Encoded,
    Options,
    Result,
    Source,
    Summary,
    Unreadable,
    describe,
)
from pretrain.data.members import MAX_CLASS
from pretrain.data.retry import one_line
from pretrain.errors import InputError

BATCH_ROWS = 32  # that are in memory as a table
STARTS = (  # of image files
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II", "tif"),
    (b"MM", "tif"),
    *((b"P%d" % i, "ppm") for i in range(1, 7)),
)


class _RowGroup(NamedTuple):
    source: Source
    number: int
    first_row: int  # in the file


class _Row(NamedTuple):
    name: str
    path: Path  # that a rule for groups looks at
    image: bytes | None
    inner: str | None  # the path that the row names
    label: Any


@dataclass(frozen=True)
class Tables:
    """Rows of parquet files; row groups are shuffled, and their rows mixed in blocks."""

    summary: Summary
    groups: Sequence[_RowGroup]
    columns: Columns
    options: Options

    def read(self, numbers: Mapping[str, int]) -> Iterator[Result]:
        """Rows with their image's bytes as they are."""
        encode = partial(_encode, columns=self.columns, numbers=numbers, options=self.options)
        rows = (row for group in self.groups for row in _rows(group, self.columns))
        return mix(in_threads(encode, rows), self.options.seed)


def find(listing: Listing, options: Options) -> Tables:
    """The row groups of parquet files; reads their footers, and the labels where these are names.

    Raises:
        InputError: pyarrow is missing, a file is damaged, or its columns are unclear or differ from the
            others'.
    """
    files = listing.files
    columns = find_columns(files[0].path, options)
    groups: list[_RowGroup] = []
    labels: set[str] = set()
    rows = 0
    for source in files:
        if find_columns(source.path, options) != columns:
            raise InputError(f"{source.path}: its columns differ from those of {files[0].path}")
        groups += _row_groups(source)
        rows += open_table(source.path).metadata.num_rows
        labels |= _label_names(source.path, columns)
    order = f"row groups shuffled with seed {options.seed}, rows mixed in blocks of {BLOCK_BYTES >> 20} MB"
    notes = (
        *listing.notes(),
        f"images from column {columns.image}, labels from {columns.label or 'none'}",
    )
    summary = Summary(rows, order, frozenset(labels), columns.classes, notes=notes)
    return Tables(summary, shuffled(groups, options.seed), columns, options)


def _row_groups(source: Source) -> list[_RowGroup]:
    footer, groups, first = open_table(source.path).metadata, [], 0
    for number in range(footer.num_row_groups):
        groups.append(_RowGroup(source, number, first))
        first += footer.row_group(number).num_rows
    return groups


def _label_names(path: Path, columns: Columns) -> set[str]:
    if columns.label is None or columns.numbered:
        return set()
    names: set[str] = set()
    try:
        for batch in open_table(path).iter_batches(columns=[columns.label]):
            names |= set(batch.column(0).unique().to_pylist())
    except Exception as error:  # pyarrow has an error of its own for each way to be damaged
        raise InputError(f"{path}: column {columns.label} is damaged ({one_line(error)})") from error
    return names - {None}


def _rows(group: _RowGroup, columns: Columns) -> Iterator[_Row]:
    """The rows of a group, a few in memory at a time."""
    path, name = group.source.path, group.source.name
    wanted = [columns.image] + ([columns.label] if columns.label else [])
    number = group.first_row
    try:
        for batch in open_table(path).iter_batches(BATCH_ROWS, [group.number], wanted):
            for row in batch.to_pylist():
                image, inner = _image_of(row[columns.image])
                label = row[columns.label] if columns.label else None
                yield _Row(f"{name}#{number}", path / (inner or str(number)), image, inner, label)
                number += 1
    except Exception as error:  # as above
        raise InputError(f"{path}: row group {group.number} is damaged ({one_line(error)})") from error


def _image_of(value: Any) -> tuple[bytes | None, str | None]:
    """The bytes of a cell and the path that it names."""
    if not isinstance(value, dict):
        return value, None
    path = value.get("path")
    return value["bytes"], path if isinstance(path, str) else None


def _encode(row: _Row, columns: Columns, numbers: Mapping[str, int], options: Options) -> Result:
    if row.image is None:
        return Unreadable(row.name, f"holds no bytes, only the path {row.inner}" if row.inner else "is empty")
    extension = extension_of(row.image)
    try:
        if extension is None:
            raise ValueError("not an image in a known format")
        check_image(row.image)
        label_name, label = _label(row.label, columns, numbers)
    except ValueError as error:
        return Unreadable(row.name, str(error))
    rule = options.group_from
    group = group_by_rule(rule, row.inner or row.name, row.path) if rule else None
    more = {"path": row.inner} if row.inner else {}
    return Encoded(extension, row.image, label, describe(row.name, label_name, label, group, **more))


def _label(value: Any, columns: Columns, numbers: Mapping[str, int]) -> tuple[str | None, int | None]:
    """(name, number) of a cell; a number below 0 stands for no label."""
    if value is None or (columns.numbered and value < 0):
        return None, None
    if not columns.numbered:
        return value, numbers[value]
    if value > MAX_CLASS:
        raise ValueError(f"its label {value} is larger than any class number")
    return (columns.classes[value] if value < len(columns.classes) else None), int(value)


def extension_of(content: bytes) -> str | None:
    """The usual extension of an image file, by its first bytes; None of anything else."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in STARTS if content.startswith(start)), None)
