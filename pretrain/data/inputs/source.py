"""What every kind of input shares: the options, a file to pack, and what comes out of reading it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class Options:
    """How to read the input; what does not concern its kind must stay at its default."""

    seed: int = 0  # of the stored order
    group_from: str | None = None  # `parent`, or a regular expression on the name
    image_column: str | None = None  # parquet
    label_column: str | None = None  # parquet
    window: tuple[float, float] | None = None  # DICOM and NIfTI: what becomes 0 and 65535
    axis: int | None = None  # NIfTI: across the slices; None = 2


@dataclass(frozen=True, slots=True)
class Source:
    """A file to pack, or one part of it."""

    path: Path
    name: str  # as in the folder or the list, `#part` for a part; kept in the sample's .json
    label_name: str | None = None
    group: str | None = None  # what must not be split, such as a patient or a video
    part: int | None = None  # a page; None = the whole file


class Encoded(NamedTuple):
    """An image as it goes into a shard."""

    extension: str  # of its format, such as jpg
    image: bytes
    label: int | None
    meta: Mapping[str, Any]


class Unreadable(NamedTuple):
    """What cannot be packed."""

    name: str
    reason: str  # one line


class Constant(NamedTuple):
    """A slice without content: every pixel has the same value."""

    name: str


Result = Encoded | Unreadable | Constant


@dataclass(frozen=True)
class Summary:
    """What was found."""

    images: int  # to be read
    order: str  # how they are mixed, for a person
    label_names: frozenset[str] = frozenset()  # classes that have no number yet
    classes: tuple[str, ...] = ()  # names of the numbers that the input has already
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = ()  # lines for a person
    tars: tuple[Path, ...] = ()  # that are read; packing must not replace them


class Input(Protocol):
    """Images of one kind, in the order in which they will be stored."""

    @property
    def summary(self) -> Summary:
        """What was found."""

    def read(self, numbers: Mapping[str, int]) -> Iterator[Result]:
        """One result per image.

        Args:
            numbers: of the classes, by name.
        """


def describe(
    name: str, label_name: str | None, label: int | None, group: str | None, **more: Any
) -> dict[str, Any]:
    """The .json of a sample."""
    return {"source": name, "label_name": label_name, "group": group, "label": label, **more}
