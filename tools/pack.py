"""Pack image files into tar shards for training: `python tools/pack.py photos/ data/ --prefix train`.

`--index` builds the indexes of existing shards instead, made by webdataset or img2dataset, say.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track

from pretrain.command_line import Parser, exit_status
from pretrain.data.indexing import build_index
from pretrain.data.shards import list_shards
from pretrain.data.sources import (
    add_groups,
    add_labels,
    find_sources,
    list_classes,
    read_sources,
    shuffle_sources,
)
from pretrain.data.writer import PackedSample, clear_shards, write_shards
from pretrain.errors import InputError


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", nargs="?", type=Path, help="image folder (sub-folders are classes), or a list")
    parser.add_argument("dst", nargs="?", type=Path, help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--shuffle-seed", type=int, default=0, metavar="S", help="of the stored order (default 0)"
    )
    parser.add_argument("--group-from", metavar="RULE", help="parent, or a regular expression on the path")
    parser.add_argument("--prefix", default="train", help="of the shards' names (default train)")
    parser.add_argument("--force", action="store_true", help="replace shards of this prefix in DST")
    parser.add_argument("--index", nargs="+", metavar="SHARD", help="only build the indexes of these shards")
    options = parser.parse_args()
    if not options.index and (options.src is None or options.dst is None):
        parser.error("give SRC and DST, or --index SHARD ...")
    return options


def pack(options: argparse.Namespace) -> str:
    """Write the shards; the line that sums up."""
    dst, report, names = (
        options.dst,
        options.dst / f"unreadable-{options.prefix}.txt",
        options.dst / "classes.json",
    )
    sources, others = find_sources(options.src)
    known = names.exists() and not options.force  # a second prefix, such as test, shares the class numbers
    classes = read_classes(names) if known else list_classes(sources)
    sources = shuffle_sources(add_labels(sources, classes), options.shuffle_seed)
    if options.group_from:
        sources = add_groups(sources, options.group_from)
    clear_shards(dst, options.prefix, options.force)
    print(f"{len(sources)} images, {len(classes)} classes; order shuffled with seed {options.shuffle_seed}")
    unreadable = [f"{name}\tnot named like an image" for name in others]
    samples = progress(read_sources(sources, unreadable), len(sources))
    shards = write_shards(samples, dst, options.prefix, options.samples_per_shard)
    report.unlink(missing_ok=True)
    if unreadable:
        report.write_text("\n".join(unreadable) + "\n", encoding="utf-8")
    if not shards:
        raise InputError(f"{options.src}: not one image can be read; see {report}")
    if classes:
        names.write_text(json.dumps(classes, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    packed = len(sources) + len(others) - len(unreadable)
    listed = f" (listed in {report})" if unreadable else ""
    return f"{packed} images in {len(shards)} shards in {dst}; {len(unreadable)} files not packed{listed}"


def read_classes(path: Path) -> list[str]:
    """Class names in the order of their numbers, as an earlier prefix wrote them."""
    try:
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]
    except ValueError as error:
        raise InputError(f"{path}: not a list of class names ({error}); --force writes it anew") from error


def progress(samples: Iterable[PackedSample], total: int) -> Iterable[PackedSample]:
    """The samples, with a bar on a terminal and ten lines elsewhere."""
    console = Console(stderr=True)
    return track(samples, "packing", total, console=console) if console.is_terminal else lines(samples, total)


def lines(samples: Iterable[PackedSample], total: int) -> Iterator[PackedSample]:
    """The samples, with plain lines of progress."""
    for count, sample in enumerate(samples, 1):
        yield sample
        if count % max(total // 10, 1) == 0:
            print(f"{count} of {total}", file=sys.stderr, flush=True)


def run() -> int:
    """Pack, or index."""
    options = parse()
    if options.index:
        shards = list_shards(options.index, "--index")
        print(f"{sum(map(build_index, shards))} samples in {len(shards)} shards indexed")
    else:
        print(pack(options))
    return 0


def main() -> int:
    """The exit status of the command."""
    return exit_status("pack.py", run)


if __name__ == "__main__":
    sys.exit(main())
