"""Running `tools/pack.py` in the test's process, and reading what it wrote."""

import io
import json
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from PIL import Image

from tests.data.pictures import encode
from tools.pack import main


class Result(NamedTuple):
    stdout: str
    stderr: str


def pack(*arguments: object, status: int = 0) -> Result:
    """Run the command; its exit status must be `status`."""
    out, err = io.StringIO(), io.StringIO()
    command = ["pack.py", *map(str, arguments)]
    with patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        assert main() == status, out.getvalue() + err.getvalue()
    return Result(out.getvalue(), err.getvalue())


def fault(*arguments: object) -> str:
    """The one line that wrong use ends with."""
    error = pack(*arguments, status=2).stderr
    assert error.count("\n") == 1 and error.startswith("pack.py: "), error
    return error


def picture(value: int, kind: str = "JPEG") -> bytes:
    """An image file of one grey."""
    return encode(np.full((16, 16, 3), value, np.uint8), kind)


class Packed(NamedTuple):
    """A sample as packed."""

    key: str
    extension: str
    image: bytes
    meta: dict
    label: int | None

    def pixels(self) -> np.ndarray:
        """As Pillow reads them, of their own type."""
        return np.asarray(Image.open(io.BytesIO(self.image)))


def packed(dst: Path, prefix: str = "train") -> list[Packed]:
    """The samples of all shards, in stored order."""
    return [sample for shard in sorted(dst.glob(f"{prefix}-*.tar")) for sample in _samples(shard)]


def _samples(shard: Path) -> list[Packed]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return [_sample(key, members) for key, members in samples.items()]


def _sample(key: str, members: dict[str, bytes]) -> Packed:
    meta, label = json.loads(members.pop("json")), members.pop("cls", None)
    ((extension, image),) = members.items()
    return Packed(key, extension, image, meta, None if label is None else int(label))


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    """A tar of members by name."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
