"""Image files, whose bytes are kept; the pages of a TIFF with several are images of their own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pretrain.data.decode import check_image
from pretrain.data.inputs.groups import group_by_rule
from pretrain.data.inputs.listing import Listing
from pretrain.data.inputs.mixing import in_threads, shuffled
from pretrain.data.inputs.source import (
    Encoded,
    Options,
    Result,
    Source,
    Summary,
    Unreadable,
    describe,
)
from pretrain.data.inputs.tiff import full_pages, read_page

TIFF_SUFFIXES = frozenset({".tif", ".tiff"})


@dataclass(frozen=True)
class Images:
    """Image files and pages, shuffled."""

    summary: Summary
    sources: Sequence[Source]

    def read(self, numbers: Mapping[str, int]) -> Iterator[Result]:
        """The files that decode, in order."""
        return in_threads(partial(_read, numbers=numbers), self.sources)


def find(listing: Listing, options: Options) -> Images:
    """Image files, each with its pages and group.

    Raises:
        InputError: a name does not match the rule for groups.
    """
    sources: list[Source] = []
    unreadable = [Unreadable(name, "not named like an image") for name in listing.others]
    tiffs = [source.path for source in listing.files if source.path.suffix.lower() in TIFF_SUFFIXES]
    found = dict(zip(tiffs, in_threads(_pages, tiffs), strict=True))
    for source in listing.files:
        pages = found.get(source.path, [])
        if isinstance(pages, str):
            unreadable.append(Unreadable(source.name, pages))
        else:
            sources += _parts(_grouped(source, options, len(pages)), pages)
    labels = frozenset(source.label_name for source in sources if source.label_name is not None)
    order = f"order shuffled with seed {options.seed}"
    summary = Summary(len(sources), order, labels, unreadable=tuple(unreadable))
    return Images(summary, shuffled(sources, options.seed))


def _pages(path: Path) -> list[int] | str:
    """The pages of a TIFF with several, or why they cannot be packed."""
    try:
        pages = full_pages(path)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return pages if len(pages) > 1 else []


def _grouped(source: Source, options: Options, pages: int) -> Source:
    """With the group of the rule; without a rule, pages have their file's name."""
    if options.group_from:
        return replace(source, group=group_by_rule(options.group_from, source.name, source.path))
    return replace(source, group=source.group or (source.name if pages else None))


def _parts(source: Source, pages: Sequence[int]) -> list[Source]:
    if not pages:
        return [source]
    return [replace(source, name=f"{source.name}#{page}", part=page) for page in pages]


def _read(source: Source, numbers: Mapping[str, int]) -> Result:
    """The file's bytes or a page's, or why they are not an image."""
    extension = source.path.suffix[1:].lower()
    try:
        if source.part is None:
            content = source.path.read_bytes()
        else:
            extension, content = read_page(source.path, source.part)
        check_image(content)
    except OSError as error:
        return Unreadable(source.name, error.strerror or str(error))
    except ValueError as error:
        return Unreadable(source.name, str(error))
    label = None if source.label_name is None else numbers[source.label_name]
    return Encoded(extension, content, label, describe(source.name, source.label_name, label, source.group))
