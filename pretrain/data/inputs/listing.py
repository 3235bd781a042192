"""The files of a folder or a list, all of one kind."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pretrain.data.inputs.source import Source
from pretrain.data.members import IMAGE_EXTENSIONS
from pretrain.errors import InputError

Kind = Literal["images", "tars", "parquet files", "DICOM files", "NIfTI volumes"]

KINDS: dict[str, Kind] = {
    ".tar": "tars",
    ".parquet": "parquet files",
    ".dcm": "DICOM files",
    ".dicom": "DICOM files",
    ".nii": "NIfTI volumes",
    ".nii.gz": "NIfTI volumes",
}
NAMES = ", ".join([*sorted(IMAGE_EXTENSIONS), *(suffix[1:] for suffix in KINDS)])
DICOM_MARK = slice(128, 132)  # of a file: holds DICM


class Listing(NamedTuple):
    """Files to pack."""

    kind: Kind
    files: list[Source]
    others: list[str]  # files of the folder that are of no kind

    def notes(self) -> tuple[str, ...]:
        """A line on the other files, for kinds that have such beside them."""
        count = len(self.others)
        return (f"{count} other files ignored, such as {self.others[0]}",) if count else ()


def list_files(src: Path) -> Listing:
    """The files of a folder, of a list file, or the one file itself.

    A folder holds images or one sub-folder of images per class, or files of another kind at any depth. A list
    has a path per line, from its own folder unless absolute, and may go on with a tab and a label, a tab and
    a group.

    Raises:
        InputError: nothing is found, kinds are mixed, or the labels are unclear; names the file or line.
    """
    if src.is_dir():
        return _from_folder(src)
    if not src.is_file():
        raise InputError(f"{src}: no such folder or list of images")
    if kind := kind_of(src):
        return Listing(kind, [Source(src, src.name)], [])
    return _from_list(src)


def kind_of(path: Path) -> Kind | None:
    """The kind of a file by its name; a name without a suffix may be that of a DICOM file."""
    suffix = path.suffix.lower()
    if suffix[1:] in IMAGE_EXTENSIONS:
        return "images"
    if path.name.lower().endswith(".nii.gz"):
        return "NIfTI volumes"
    if not suffix or suffix[1:].isdecimal():  # scanners name files IM0001 or 1.2.840.113619.2
        return "DICOM files" if path.name != "DICOMDIR" and _has_dicom_mark(path) else None
    return KINDS.get(suffix)


def _has_dicom_mark(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(DICOM_MARK.stop)[DICOM_MARK] == b"DICM"
    except OSError:
        return False


def _from_folder(src: Path) -> Listing:
    paths = sorted(_walk(src))
    visible = [path for path in paths if not any(part[0] == "." for part in path.relative_to(src).parts)]
    kinds = {path: kind_of(path) for path in visible}
    _drop_notes_of_tars(kinds)
    kind = _only_kind(src, [path for path in visible if kinds[path]], kinds)
    names = [path.relative_to(src) for path in visible if kinds[path]]
    labelled = kind == "images" and _has_class_folders(src, names)
    files = [Source(src / name, name.as_posix(), name.parts[0] if labelled else None) for name in names]
    return Listing(kind, files, [str(path.relative_to(src)) for path in visible if not kinds[path]])


def _walk(src: Path) -> Iterator[Path]:
    """Every file below a folder, through links too: class folders are often links.

    Raises:
        InputError: a link leads back to a folder above it, a folder cannot be read, or a file is a pipe,
            socket or device.
    """
    for folder, folders, names in os.walk(src, onerror=_refuse_folder, followlinks=True):
        above = [path.resolve() for path in (Path(folder), *Path(folder).parents) if path.is_relative_to(src)]
        for link in (path for name in folders if (path := Path(folder, name)).is_symlink()):
            if any(
                path.is_relative_to(link.resolve()) for path in above
            ):  # it would be walked round and round
                raise InputError(f"{link}: is a link to {link.resolve()}, which it lies in; remove it")
        for path in (Path(folder, name) for name in names):
            if path.exists() and not path.is_file():  # reading it might wait for ever
                raise InputError(f"{path}: is a pipe, socket or device; move it elsewhere")
            yield path


def _refuse_folder(error: OSError) -> None:
    """`os.walk` would leave it out without a word."""
    raise InputError(f"{error.filename}: {error.strerror}; make it readable or move it elsewhere") from error


def _drop_notes_of_tars(kinds: dict[Path, Kind | None]) -> None:
    """img2dataset writes a table without images beside each tar."""
    for path, kind in kinds.items():
        if kind == "parquet files" and path.with_suffix(".tar") in kinds:
            kinds[path] = None


def _only_kind(src: Path, paths: Sequence[Path], kinds: dict[Path, Kind | None]) -> Kind:
    first: dict[Kind, Path] = {}
    for path in paths:
        if kind := kinds[path]:
            first.setdefault(kind, path)
    if not first:
        raise InputError(f"{src}: holds no image ({NAMES})")
    if len(first) > 1:
        (one, example), (other, second) = list(first.items())[:2]
        raise InputError(
            f"{src}: holds {one} ({example.name}) and {other} ({second.name}); give one kind at a time, "
            "or a list of paths"
        )
    return next(iter(first))


def _has_class_folders(src: Path, names: Sequence[Path]) -> bool:
    flat = [name for name in names if len(name.parts) == 1]
    if flat and len(flat) < len(names):
        raise InputError(f"{src}: holds images and sub-folders with images; move {flat[0]} and its like")
    return not flat


def _from_list(src: Path) -> Listing:
    try:
        lines = src.read_text(encoding="utf-8-sig").splitlines()  # Windows begins a text with a mark
    except UnicodeDecodeError as error:
        raise InputError(f"{src}: neither a folder nor a text file with a path per line") from error
    files = [_from_line(src, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not files:
        raise InputError(f"{src}: names no image")
    unlabelled = sum(source.label_name is None for source in files)
    if 0 < unlabelled < len(files):
        raise InputError(f"{src}: {unlabelled} of {len(files)} lines have no label; label all lines or none")
    kind = _only_kind(src, [file.path for file in files], {file.path: kind_of(file.path) for file in files})
    if kind in ("tars", "parquet files") and any(file.label_name or file.group for file in files):
        raise InputError(f"{src}: labels and groups of {kind} come from their content; list only the paths")
    return Listing(kind, files, [])


def _from_line(src: Path, number: int, line: str) -> Source:
    name, *rest = line.split("\t")
    path = src.parent / name  # an absolute name stays as it is
    if len(rest) > 2:
        raise InputError(f"{src}: line {number}: more than path, label and group between tabs")
    if path.exists() and not path.is_file():
        raise InputError(f"{src}: line {number}: {name} is not a file")
    if kind_of(path) is None:
        raise InputError(f"{src}: line {number}: {name} is not named like an image ({NAMES})")
    label, group = (*rest, "", "")[:2]
    return Source(path, name, label or None, group or None)
