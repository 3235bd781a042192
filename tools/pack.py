"""Pack images into tar shards for training: `python tools/pack.py photos/ data/ --prefix train`.

SRC is a folder, a list (a path per line; a tab and a label, a tab and a group may follow) or one file. It
holds one kind of input: image files (sub-folders are classes; the pages of a TIFF with several are images),
tar shards, parquet files with a column of images, DICOM files, or NIfTI volumes. docs/data.md says what
becomes of each.

`--index` builds the indexes of existing shards instead, made by webdataset or img2dataset, say.
`--verify` reads every byte of existing shards and decodes every image; exit status 1 where there is a fault.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from pretrain.command_line import Parser, exit_status
from pretrain.data.indexing import build_indexes
from pretrain.data.inputs.choose import open_input
from pretrain.data.inputs.classes import agree_on_classes, read_classes, write_classes
from pretrain.data.inputs.source import Options, Unreadable
from pretrain.data.inputs.tally import Tally, numbered
from pretrain.data.shards import list_shards
from pretrain.data.verify import verify_shard
from pretrain.data.writer import PackedSample, clear_shards, write_shards
from pretrain.errors import InputError, printable

FAULTY = 1  # exit status

T = TypeVar("T")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", nargs="?", type=Path, help="folder, list or file; see above")
    parser.add_argument("dst", nargs="?", type=Path, help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--shuffle-seed", type=int, default=0, metavar="S", help="of the stored order (default 0)"
    )
    parser.add_argument("--group-from", metavar="RULE", help="parent, or a regular expression on the path")
    parser.add_argument("--prefix", default="train", help="of the shards' names (default train)")
    parser.add_argument("--force", action="store_true", help="replace shards of this prefix in DST")
    _add_format_options(parser)
    parser.add_argument("--index", nargs="+", metavar="SHARD", help="only build the indexes of these shards")
    parser.add_argument("--verify", nargs="+", metavar="SHARD", help="only look for faults in these shards")
    options = parser.parse_args()
    if options.samples_per_shard < 1:  # here: --force would have removed the old shards by then
        parser.error(f"--samples-per-shard {options.samples_per_shard}: must be at least 1")
    if options.index and options.verify:
        parser.error("give --index or --verify, not both")
    if (options.index or options.verify) and options.src:
        parser.error(f"--index and --verify take shards only, not {options.src}")
    if not (options.index or options.verify or options.dst):
        parser.error("give SRC and DST, or --index SHARD ..., or --verify SHARD ...")
    return options


def _add_format_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-column", metavar="NAME", help="parquet: of the images, where several could be"
    )
    parser.add_argument(
        "--label-column", metavar="NAME", help="parquet: integers or strings (default: label, if any)"
    )
    parser.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="DICOM, NIfTI: values (HU, say) that become 0 and 65535; default: the smallest and largest of "
        "the series or volume",
    )
    parser.add_argument("--axis", type=int, metavar="0|1|2", help="NIfTI: across the slices (default 2)")


def pack(options: argparse.Namespace) -> str:
    """Write the shards; the line that sums up."""
    dst, names = options.dst, options.dst / "classes.json"
    found = open_input(options.src, reading_options(options))
    summary = found.summary
    known = read_classes(names) if names.exists() and not options.force else None  # of another prefix
    classes = agree_on_classes(summary, known)
    clear_shards(dst, options.prefix, options.force, summary.tars)
    print(f"{summary.images} images, {len(classes)} classes; {summary.order}")
    print(*map(printable, summary.notes), sep="\n", end="\n" if summary.notes else "")
    tally = Tally(unreadable=list(summary.unreadable))
    results = found.read({name: number for number, name in enumerate(classes)})
    samples = progress(numbered(results, tally), summary.images)
    shards = write_shards(samples, dst, options.prefix, options.samples_per_shard)
    report = dst / f"unreadable-{options.prefix}.txt"
    write_report(report, tally.unreadable)
    if not shards:
        raise InputError(f"{options.src}: not one image can be read; see {report}")
    if classes:
        write_classes(names, classes)
    print(*tally.window_lines(), sep="\n", end="\n" if tally.windows else "")
    return sum_up(tally, len(shards), dst, report)


def reading_options(options: argparse.Namespace) -> Options:
    """What concerns the reading of the input."""
    return Options(
        seed=options.shuffle_seed,
        group_from=options.group_from,
        image_column=options.image_column,
        label_column=options.label_column,
        window=tuple(options.window) if options.window else None,
        axis=options.axis,
    )


def write_report(path: Path, unreadable: Iterable[Unreadable]) -> None:
    """One line for each, name and reason with a tab between them; no file where there is none."""
    lines = [f"{printable(name)}\t{printable(reason)}\n" for name, reason in unreadable]
    path.unlink(missing_ok=True)
    if lines:
        path.write_text("".join(lines), encoding="utf-8")


def sum_up(tally: Tally, shards: int, dst: Path, report: Path) -> str:
    """The last line."""
    listed = f" (listed in {report})" if tally.unreadable else ""
    constant = f"{tally.constant} constant slices skipped; " if tally.constant else ""
    return (
        f"{tally.packed} images in {shards} shards in {dst}; "
        f"{constant}{len(tally.unreadable)} files not packed{listed}"
    )


def progress(samples: Iterable[PackedSample], total: int) -> Iterable[PackedSample]:
    """The samples, with a bar on a terminal and ten lines elsewhere."""
    return bar(samples, total, "packing") if Console(stderr=True).is_terminal else lines(samples, total)


def bar(items: Iterable[T], total: int, task: str) -> Iterable[T]:
    """The items, with a bar on a terminal."""
    console = Console(stderr=True)
    return track(items, task, total, console=console) if console.is_terminal else items


def lines(samples: Iterable[PackedSample], total: int) -> Iterator[PackedSample]:
    """The samples, with plain lines of progress."""
    for count, sample in enumerate(samples, 1):
        yield sample
        if count % max(total // 10, 1) == 0:
            print(f"{count} of {total}", file=sys.stderr, flush=True)


def index(patterns: list[str]) -> int:
    """Build indexes; the exit status."""
    shards = list_shards(patterns, "--index")
    samples = sum(bar(build_indexes(shards), len(shards), "indexing"))
    print(f"{samples} samples in {len(shards)} shards indexed")
    return 0


def verify(patterns: list[str]) -> int:
    """Print a line for every fault; the exit status."""
    shards = list_shards(patterns, "--verify")
    faulty, faults = set(), 0
    for shard in bar(shards, len(shards), "verifying"):
        for fault in verify_shard(shard):
            print(fault, flush=True)
            faulty.add(shard)
            faults += 1
    print(f"{len(shards)} shards read: {faults} faults" + (f" in {len(faulty)} shards" if faults else ""))
    return FAULTY if faults else 0


def run() -> int:
    """Pack, index or verify."""
    options = parse()
    if options.index:
        return index(options.index)
    if options.verify:
        return verify(options.verify)
    print(pack(options))
    return 0


def main() -> int:
    """The exit status of the command."""
    return exit_status("pack.py", run)


if __name__ == "__main__":
    sys.exit(main())
