import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.data.index import index_path
from pretrain.data.indexing import build_index, build_indexes
from pretrain.data.reader import Reader
from pretrain.data.tar import scan
from pretrain.data.verify import verify_shard
from pretrain.data.writer import PackedSample, write_shards
from tests.data.packing import fault, pack, picture, write_tar

TOOL = Path(__file__).parents[2] / "tools" / "pack.py"


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    samples = (PackedSample(f"k{i}", "jpg", picture(i), i, {"number": i}) for i in range(9))
    return write_shards(samples, tmp_path, "train", 3)


def damage(shard: Path, name: str, place: int, keep_index: bool = True) -> None:
    """Flip the bits of one byte of a member, from its start; the index stays newer than the shard."""
    offset = next(member.offset for member in scan(shard) if member.name == name)
    content = bytearray(shard.read_bytes())
    content[offset + place] ^= 0xFF
    shard.write_bytes(content)
    if keep_index:
        os.utime(index_path(shard))


def reasons(shard: Path) -> list[str]:
    return [str(fault).removeprefix(f"{shard}: ") for fault in verify_shard(shard)]


def test_sound_shards(shards: list[Path], tmp_path: Path) -> None:
    result = pack("--verify", tmp_path / "*.tar")
    assert result.stdout == "3 shards read: 0 faults\n"


def test_every_fault_is_one_line(shards: list[Path], tmp_path: Path) -> None:
    damage(shards[0], "k1.jpg", 300)
    damage(shards[0], "k2.json", 0)
    shards[2].write_bytes(shards[2].read_bytes()[:2000])
    lines = pack("--verify", tmp_path / "*.tar", status=1).stdout.splitlines()
    assert lines[0].startswith(f"{shards[0]}: k2.json: is not JSON")
    assert lines[1] == f"{shards[0]}: k1: its bytes differ from the checksum in the index; restore the shard"
    assert lines[2].startswith(f"{shards[2]}: byte ") and "cut short" in lines[2]
    assert lines[3:] == ["3 shards read: 3 faults in 2 shards"]


def test_damaged_headers(shards: list[Path]) -> None:
    damage(shards[0], "k1.jpg", -512)
    (line,) = reasons(shards[0])
    assert line.startswith("byte ") and "wrong checksum" in line


def test_a_missing_index_is_a_fault_and_the_rest_is_read(shards: list[Path]) -> None:
    index_path(shards[0]).unlink()
    damage(shards[0], "k0.json", 0, keep_index=False)
    first, second = reasons(shards[0])
    assert first == "has no index, or one of other content; build it with --index"
    assert second.startswith("k0.json: is not JSON")


def test_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    cut = picture(1, "PNG")[:50]  # the header is whole, so it can be indexed
    shard = write_tar(tmp_path / "x.tar", {"a.png": cut, "b.png": picture(2, "PNG")})
    build_index(shard)
    (line,) = reasons(shard)
    assert line.startswith("a: cannot be decoded (")


def test_an_index_of_another_shard(shards: list[Path], tmp_path: Path) -> None:
    names = [member.name for member in scan(shards[0])]
    content = shards[0].read_bytes().replace(b"k1.", b"kX.")  # as long, other keys
    assert "k1.jpg" in names
    shards[0].write_bytes(repair_checksums(content))
    os.utime(index_path(shards[0]))
    assert reasons(shards[0]) == [
        "kX: is not in the index; build it anew with --index",
        "k1: does not lie where the index says; build it anew with --index",
    ]


def repair_checksums(content: bytes) -> bytes:
    """Headers of `kX` with the sum of their own bytes."""
    fixed = bytearray(content)
    start = fixed.find(b"kX.")
    while start >= 0:
        header = fixed[start : start + 512]
        header[148:156] = b" " * 8
        fixed[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        start = fixed.find(b"kX.", start + 512)
    return bytes(fixed)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (line,) = reasons(tmp_path / "none.tar")
    assert line == "No such file or directory"


def test_indexes_by_several_processes(shards: list[Path], tmp_path: Path) -> None:
    before = {shard: index_path(shard).read_bytes() for shard in shards}
    for shard in shards:
        index_path(shard).unlink()
    assert list(build_indexes(shards)) == [3, 3, 3]
    assert before == {shard: index_path(shard).read_bytes() for shard in shards}
    assert Reader(shards).sizes == [3, 3, 3]


def test_the_script_starts_processes(shards: list[Path]) -> None:
    command = [sys.executable, str(TOOL), "--index", *map(str, shards)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "9 samples in 3 shards indexed\n" and not result.stderr


def test_a_damaged_shard_ends_the_indexing_with_its_name(shards: list[Path]) -> None:
    damage(shards[1], "k4.jpg", -512)
    assert fault("--index", *shards).startswith(f"pack.py: {shards[1]}: byte ")
