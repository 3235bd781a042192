"""What the fuzzer knows of a kind of input: whole examples, and a look at all of a damaged one."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import InputError

Files = dict[str, bytes]
WORKED, REFUSED, CORRUPT = "worked", "refused", "counted corrupt"


@dataclass(frozen=True)
class Subject:
    """A kind of input."""

    examples: Callable[[Path], list[Files]]  # written with the help of an empty folder
    look: Callable[[Path], str]  # at a folder of damaged files: what became of them; raises InputError


def outcome(subject: Subject, folder: Path) -> str:
    """What became of a case; raises what may not be."""
    try:
        return subject.look(folder)
    except InputError as error:
        assert str(error).strip(), "a refusal without a word"
        return REFUSED


def write_case(folder: Path, files: Files) -> None:
    """The files of a case, and no others, in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
