"""Which kind of input a path holds."""

from math import inf
from pathlib import Path

from pretrain.data.inputs import dicom, images, nifti, parquet, tars
from pretrain.data.inputs.listing import Kind, list_files
from pretrain.data.inputs.source import Input, Options
from pretrain.errors import InputError

CONCERNS: dict[str, tuple[Kind, ...]] = {
    "image_column": ("parquet files",),
    "label_column": ("parquet files",),
    "window": ("DICOM files", "NIfTI volumes"),
    "axis": ("NIfTI volumes",),
}


def open_input(src: Path, options: Options) -> Input:
    """The images of a folder, a list or a file, in the order in which they will be stored.

    Raises:
        InputError: nothing is found, the input is not clear or damaged, or an option does not concern it.
    """
    listing = list_files(src)
    _check_options(src, listing.kind, options)
    match listing.kind:
        case "images":
            return images.find(listing, options)
        case "tars":
            return tars.find(listing, options)
        case "parquet files":
            return parquet.find(listing, options)
        case "DICOM files":
            return dicom.find(listing, options)
        case "NIfTI volumes":
            return nifti.find(listing, options)


def _check_options(src: Path, kind: Kind, options: Options) -> None:
    for name, kinds in CONCERNS.items():
        if getattr(options, name) is not None and kind not in kinds:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: is for {' and '.join(kinds)}; {src} holds {kind}")
    if options.window and not -inf < options.window[0] < options.window[1] < inf:
        low, high = options.window
        raise InputError(f"--window {low:g} {high:g}: give two numbers, the smaller one first")
