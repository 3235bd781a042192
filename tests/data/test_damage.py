"""What a user sees of damaged data: an error that names the shard, or a line in corrupt.tsv."""

import io
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config.schema import Config
from pretrain.data.index import HEADER, MAGIC, index_path, open_index
from pretrain.data.loader import TrainLoader
from pretrain.data.reader import CorruptSample, Reader
from pretrain.errors import InputError
from tests.data.conftest import GLOBAL_BATCH
from tests.data.pictures import encode

MakeConfig = Callable[..., Config]
Members = dict[str, bytes]
COUNT = 16


def pictures() -> Members:
    """Different JPEGs, 0000.jpg to 0015.jpg."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 40, 50, 3), np.uint8)
    return {f"{i:04d}.jpg": encode(image) for i, image in enumerate(images)}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def load(make_config: MakeConfig, shard: Path, run: Path, workers: int = 0) -> tuple[int, list[str]]:
    """Images of one pass over the shard, and the lines of corrupt.tsv."""
    cfg = make_config(shards=[str(shard)], shuffle="none", workers=workers, max_corrupt=0.5)
    loader = TrainLoader(cfg, torch.device("cpu"), GLOBAL_BATCH, folder=run)
    images = sum(batch.num_images for _, batches in loader.steps(0, 1) for batch in batches)
    report = run / "corrupt.tsv"
    return images, report.read_text().splitlines() if report.exists() else []


# -- damage to a sample: the others are read, this one is named and replaced


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param({"0003.jpg": b""}, "has zero bytes", id="zero-byte image"),
        pytest.param({"0003.jpg": "half"}, "truncated|premature|cannot load|incomplete", id="half a JPEG"),
        pytest.param({"0003.jpg": b"just text"}, "not an image in a known format", id="text named jpg"),
        pytest.param({"0003.jpg": None, "0003.json": b"{}"}, "has no image", id="missing member"),
        pytest.param({"0003.jpg": None, "0003.png": "bomb"}, "pixels", id="bomb"),
    ],
)
def test_a_damaged_sample_is_named_and_replaced(
    make_config: MakeConfig, tmp_path: Path, damage: dict[str, object], reason: str, workers: int
) -> None:
    members = pictures()
    made = {"half": members["0003.jpg"][: len(members["0003.jpg"]) // 2], "bomb": bomb()}
    changed = {name: made[value] if isinstance(value, str) else value for name, value in damage.items()}
    found = [(name, content) for name, content in {**members, **changed}.items() if content is not None]
    shard = write_tar(tmp_path / "x.tar", found)
    images, report = load(make_config, shard, tmp_path / "run", workers)
    assert images == COUNT
    assert len(report) == 1
    path, key, why = report[0].split("\t")
    assert (path, key) == (str(shard), "0003")
    assert re.search(reason, why), why


# -- oddities that are no damage: everything is read


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("0003.jpg", "0003.png", id="wrong extension"),
        pytest.param("0003.jpg", "../../3.jpg", id="path with .."),
    ],
)
def test_an_odd_name_changes_nothing(make_config: MakeConfig, tmp_path: Path, old: str, new: str) -> None:
    members = [(new if name == old else name, content) for name, content in pictures().items()]
    shard = write_tar(tmp_path / "x.tar", members)
    before = {path for path in tmp_path.parent.rglob("*") if path.is_file()}
    assert load(make_config, shard, tmp_path / "run") == (COUNT, [])
    after = {path for path in tmp_path.parent.rglob("*") if path.is_file()}
    assert after - before == {index_path(shard)}  # nothing is ever extracted


# -- damage to a shard: an error that names it, before the first step


def flip_header(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[content.index(b"0007.jpg") + 2] ^= 1
    shard.write_bytes(content)


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def duplicate(shard: Path) -> None:
    write_tar(shard, [*pictures().items(), ("0003.jpg", b"again")])


def empty(shard: Path) -> None:
    shard.write_bytes(b"")


def no_samples(shard: Path) -> None:
    write_tar(shard, [])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_header, r"x.tar: byte \d+: damaged tar header \(wrong checksum\); restore or re-pack"),
        (truncate, r"x.tar: byte \d+: .*\(cut short\); restore it"),
        (duplicate, r"x.tar: byte \d+: 0003.jpg is in the shard twice; re-pack it"),
        (empty, r"x.tar: is empty or cut short at byte 0; restore or re-pack it"),
        (no_samples, r"data.shards: .*x.tar hold no sample"),
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_a_damaged_shard_is_an_error(
    make_config: MakeConfig, tmp_path: Path, damage: Callable[[Path], None], message: str, indexed: bool
) -> None:
    shard = write_tar(tmp_path / "x.tar", list(pictures().items()))
    if indexed:  # damaged after its index was built
        assert load(make_config, shard, tmp_path / "run") == (COUNT, [])
    damage(shard)
    with pytest.raises(InputError, match=message) as caught:
        load(make_config, shard, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"11 size=-1\n", b"14 size=-1024\n"])
def test_a_negative_size_is_damage_and_not_the_way_back(tmp_path: Path, line: bytes) -> None:
    shard = write_tar(tmp_path / "x.tar", list(pictures().items()))
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, len(line)
    shard.write_bytes(pax.tobuf() + line.ljust(512, b"\0") + shard.read_bytes())
    with pytest.raises(InputError, match=r"x.tar: byte 1024: damaged tar header \(no size\)"):
        Reader([shard])


def test_an_index_with_an_impossible_head_is_built_anew(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", list(pictures().items()))
    Reader([shard]).close()
    whole = index_path(shard).read_bytes()
    head = HEADER.pack(MAGIC, 2**32 - 1, 0, shard.stat().st_size, COUNT)
    index_path(shard).write_bytes(head + whole[HEADER.size :])
    assert Reader([shard]).sizes == [COUNT]
    assert index_path(shard).read_bytes() == whole


@pytest.mark.parametrize(("field", "value"), [("offset", 2**64 - 1), ("size", 2**32 - 1)])
def test_a_record_that_points_outside_is_a_corrupt_sample(tmp_path: Path, field: str, value: int) -> None:
    shard = write_tar(tmp_path / "x.tar", list(pictures().items()))
    Reader([shard]).close()
    records = open_index(index_path(shard)).copy()
    records[3][field] = value
    index_path(shard).write_bytes(index_path(shard).read_bytes()[: HEADER.size] + records.tobytes())
    reader = Reader([shard])
    with pytest.raises(CorruptSample, match="sample 0003: its bytes differ from the index"):
        reader.read(0, 3)
    assert reader.read(0, 4).key == "0004"


def test_the_index_of_another_tar_is_replaced(make_config: MakeConfig, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", list(pictures().items()))
    other = write_tar(tmp_path / "y.tar", list(pictures().items())[:8])
    load(make_config, other, tmp_path / "run")
    index_path(other).rename(index_path(shard))
    assert load(make_config, shard, tmp_path / "run") == (COUNT, [])
