"""Writes the hook for Hugging Face's models as a file that stands alone, with a model's register neurons."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pretrain.errors import InputError
from pretrain.run.durable import write_text
from pretrain.sinder import hugging_face_hook

EMPTY = "NEURONS: dict[int, list[int]] = {}\n"  # the line of the hook that is filled in
WIDTH = 88  # columns of the lists of units that stand on one line


def check_hook(path: Path, force: bool) -> None:
    """Refuse a path where no hook can be written, before any work is done.

    Raises:
        InputError: it is no name of a Python file, or something is there.
    """
    if path.suffix != ".py":
        raise InputError(f"--hook {path}: a Python file is written; name it *.py")
    if path.is_dir() or ((path.exists() or path.is_symlink()) and not force):
        raise InputError(f"--hook {path}: exists; choose another name, or replace a file with --force")


def write_hook(path: Path, pairs: Iterable[Sequence[int]]) -> None:
    """Write the hook in one step.

    Args:
        path: of the file.
        pairs: block and hidden unit of each neuron.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, hook_text(pairs))
    except OSError as error:
        raise InputError(f"{path}: the hook cannot be written ({error})") from error


def hook_text(pairs: Iterable[Sequence[int]]) -> str:
    """The source of the hook with these neurons."""
    units: defaultdict[int, list[int]] = defaultdict(list)
    for block, unit in sorted(map(tuple, pairs)):
        units[block].append(unit)
    source = Path(hugging_face_hook.__file__).read_text(encoding="utf-8")
    assert source.count(EMPTY) == 1
    filled = [line for block in units for line in _entry(block, units[block])]
    return source.replace(EMPTY, "\n".join([EMPTY.removesuffix("}\n"), *filled, "}\n"]))


def _entry(block: int, units: Sequence[int]) -> Iterator[str]:
    line = f"    {block}: {list(units)},"
    if len(line) <= WIDTH:
        yield line
        return
    yield f"    {block}: ["
    yield from (f"        {unit}," for unit in units)
    yield "    ],"
