"""Which columns of a parquet file hold the images and the labels."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pretrain.data.inputs.optional import load_library
from pretrain.data.inputs.source import Options
from pretrain.data.retry import one_line
from pretrain.errors import InputError

DEFAULT_LABEL = "label"  # column; not used where it holds neither integers nor strings

BUFFER_BYTES = 1 << 20  # read at a time; else the whole column of a row group is in memory


class Columns(NamedTuple):
    """Where things are in a file."""

    image: str
    label: str | None
    numbered: bool  # labels are integers
    classes: tuple[str, ...]  # names of the numbers, where the file has them


def open_table(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
        InputError: pyarrow is missing, or the file is damaged.
    """
    library = load_library("pyarrow.parquet")
    try:
        return library.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except Exception as error:  # pyarrow has an error of its own for each way to be damaged
        raise InputError(f"{path}: is not a whole parquet file ({one_line(error)})") from error


def find_columns(path: Path, options: Options) -> Columns:
    """The columns of images and of labels.

    Raises:
        InputError: there is no column of images, there are several and none is named, or two of one name.
    """
    schema = _schema(path)
    images = [field.name for field in schema if _holds_images(field.type)]
    image = options.image_column or (images[0] if len(images) == 1 else None)
    if image is None:
        found = f"{len(images)} columns that may hold images ({', '.join(images)})" if images else "none"
        raise InputError(f"{path}: --image-column: {found}; columns: {', '.join(schema.names)}")
    if image not in images:
        raise InputError(f"{path}: --image-column {image}: holds no images; columns: {_types(schema)}")
    label = options.label_column or DEFAULT_LABEL
    for name in (image, label):
        if schema.names.count(name) > 1:
            raise InputError(f"{path}: has {schema.names.count(name)} columns named {name}; rename them")
    kind = _label_kind(schema, label)
    if kind is None and options.label_column:
        raise InputError(
            f"{path}: --label-column {label}: no column of integers or strings; columns: {_types(schema)}"
        )
    if kind is None:
        return Columns(image, None, False, ())
    return Columns(image, label, kind == "numbers", _class_names(schema, label))


def _schema(path: Path) -> Any:
    try:
        return open_table(path).schema_arrow
    except InputError:
        raise
    except Exception as error:  # as above: the types of the columns are looked at here
        raise InputError(f"{path}: its columns cannot be read ({one_line(error)})") from error


def _holds_images(kind: Any) -> bool:
    types = load_library("pyarrow.types")
    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    types = load_library("pyarrow.types")
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _label_kind(schema: Any, label: str) -> Literal["numbers", "names"] | None:
    """What the column holds; None where it cannot be a label."""
    types = load_library("pyarrow.types")
    if label not in schema.names:
        return None
    kind = schema.field(label).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_integer(kind):
        return "numbers"
    return "names" if types.is_string(kind) or types.is_large_string(kind) else None


def _types(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """What the `datasets` library noted about a column of classes."""
    try:
        notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return tuple(map(str, notes["info"]["features"][label]["names"]))
    except (ValueError, KeyError, TypeError):
        return ()
