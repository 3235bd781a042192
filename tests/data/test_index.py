import io
import os
import pickle
import resource
import signal
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from pretrain.data import indexing
from pretrain.data.index import index_path, open_index
from pretrain.data.indexing import build_index, ensure_index, in_processes
from pretrain.data.reader import MAX_OPEN, CorruptSample, Reader
from pretrain.data.tar import scan
from pretrain.errors import InputError, TrainingError
from tests.data.pictures import encode

PICTURE = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
JPEG, PNG = encode(PICTURE), encode(PICTURE, "PNG")


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_reads_what_webdatasets_writer_wrote(tmp_path: Path) -> None:
    with wds.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"k{i}", "jpg": JPEG, "cls": i, "json": {"i": i}})
    reader = Reader(sorted(tmp_path.glob("*.tar")))
    assert reader.sizes == [3, 2]
    item = reader.read(1, 0)
    assert (item.key, item.image, item.label) == ("k3", JPEG, 3)


def test_reads_the_layout_of_img2dataset(tmp_path: Path) -> None:
    members = {}
    for i in range(3):
        members |= {f"00000{i}.jpg": JPEG, f"00000{i}.json": b'{"a": 1}', f"00000{i}.txt": b"caption"}
    path = write_tar(tmp_path / "x.tar", members)
    assert build_index(path) == 3
    record = open_index(index_path(path))[2]
    assert (record["key"], record["extension"], record["width"], record["height"]) == (
        b"000002",
        b"jpg",
        30,
        20,
    )
    assert (record["crc32"], record["label"]) == (zlib.crc32(JPEG), -1)
    content = path.read_bytes()
    assert content[record["offset"] :][: record["size"]] == JPEG
    assert content[record["json_offset"] :][: record["json_size"]] == b'{"a": 1}'


def test_interleaved_members_are_one_sample(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar", {"a.png": PNG, "b.png": PNG, "a.cls": b"4", "b.cls": b"5\n", "d/a.jpg": JPEG}
    )
    assert build_index(path) == 3
    records = open_index(index_path(path))
    assert records["key"].tolist() == [b"a", b"b", b"d/a"]
    assert records["label"].tolist() == [4, 5, -1]


def test_keys_end_at_the_first_dot_of_the_base_name(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar", {"v1.0/a.seg.png": PNG, "v1.0/a.JPG": JPEG, "__notes__": b"", "._a.jpg": b""}
    )
    assert build_index(path) == 1
    assert open_index(index_path(path))["key"].tolist() == [b"v1.0/a"]
    assert open_index(index_path(path))["extension"].tolist() == [b"jpg"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path: Path, form: int) -> None:
    long = "/".join(["a" * 60] * 2) + "/" + "b" * 80
    names = [f"{long}.jpg", "short.jpg"] + (
        [f"{'n' * 150}.png", "é.png"] if form != tarfile.USTAR_FORMAT else []
    )
    path = write_tar(tmp_path / "x.tar", dict.fromkeys(names, PNG), form)
    assert [member.name for member in scan(path)] == names
    assert all(path.read_bytes()[m.offset : m.offset + m.size] == PNG for m in scan(path))
    assert build_index(path) == len(names)


def test_folders_and_links_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = len(JPEG)
        tar.addfile(info, io.BytesIO(JPEG))
    assert [member.name for member in scan(tmp_path / "x.tar")] == ["a.jpg"]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "x.tar", {f"{i}.png": PNG for i in range(6)})


def damage_header(path: Path) -> int:
    offset = list(scan(path))[3].offset - 512
    overwrite(path, offset + 3, b"?")
    return offset


def cut_in_member(path: Path) -> int:
    member = list(scan(path))[3]
    cut(path, member.offset + member.size // 2)
    return member.offset - 512


def cut_between_members(path: Path) -> int:
    offset = list(scan(path))[3].offset - 512
    cut(path, offset)
    return offset


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_header, "wrong checksum"),
        (cut_in_member, "cut short"),
        (cut_between_members, "without the end mark"),
    ],
)
def test_damage_names_shard_and_byte(shard: Path, damage: Callable[[Path], int], message: str) -> None:
    offset = damage(shard)
    with pytest.raises(ValueError, match=f"^{shard}: byte {offset}: .*{message}"):
        build_index(shard)
    assert not index_path(shard).exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset's open file
def test_damage_that_webdataset_passes_over_is_an_error(shard: Path) -> None:
    damage_header(shard)
    delivered = list(wds.WebDataset([str(shard)], shardshuffle=False))
    assert len(delivered) == 3  # three of six are lost, and nothing says so
    with pytest.raises(ValueError, match="wrong checksum"):
        Reader([shard])


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b" + bytes(2000)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.tar: is (not an uncompressed tar|empty or cut)"):
        build_index(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": JPEG, "a.cls": b"cat"}, "a.cls holds b'cat', not a class number"),
        ({"a.jpg": JPEG, "./b.jpg": JPEG, "a.JPG": JPEG}, "a.JPG is in the shard twice"),
    ],
)
def test_unclear_samples_are_errors(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(write_tar(tmp_path / "x.tar", members))


def test_unusable_samples_are_kept_and_told_when_they_are_read(tmp_path: Path) -> None:
    members = {"a.jpg": JPEG, "b.json": b"{}", "c.jpg": b"", "d.jpg": b"hello"}
    path = write_tar(tmp_path / "x.tar", members)
    assert build_index(path) == 4
    assert open_index(index_path(path))["width"].tolist() == [30, 0, 0, 0]
    reader = Reader([path])
    assert reader.read(0, 0).image == JPEG and reader.read(0, 3).image == b"hello"
    for number, reason in ((1, "sample b: has no image"), (2, "sample c: has zero bytes")):
        with pytest.raises(CorruptSample, match=reason):
            reader.read(0, number)


def test_an_older_index_of_the_same_tar_is_used(shard: Path) -> None:
    ensure_index(shard)
    os.utime(shard, ns=(0, index_path(shard).stat().st_mtime_ns + 1))
    index_path(shard).chmod(0o400)
    before = index_path(shard).stat().st_ino
    assert ensure_index(shard) == 6 and index_path(shard).stat().st_ino == before


def test_the_index_of_another_tar_is_not_used(shard: Path, tmp_path: Path) -> None:
    other = write_tar(tmp_path / "other.tar", {f"k{i}.png": PNG for i in range(6)})
    assert other.stat().st_size == shard.stat().st_size
    ensure_index(other)
    os.utime(shard, ns=(0, index_path(other).stat().st_mtime_ns + 1))
    index_path(other).rename(index_path(shard))
    ensure_index(shard)
    assert open_index(index_path(shard))["key"].tolist() == [b"%d" % i for i in range(6)]


def test_a_damaged_pax_header(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"n" * 150 + ".png": PNG}, tarfile.PAX_FORMAT)
    for content in (b"0 path=x\n", b"999 path=x\n", b"x", b"11 size=1e5\n"):
        overwrite(path, 512, content)
        with pytest.raises(ValueError, match=r"x.tar: byte 512: damaged pax header"):
            list(scan(path))


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {})
    assert ensure_index(path) == 0
    assert len(open_index(index_path(path))) == 0


def test_the_index_is_kept_while_the_shard_is_the_same(shard: Path) -> None:
    assert ensure_index(shard) == 6
    before = index_path(shard).stat().st_mtime_ns, index_path(shard).stat().st_ino
    assert ensure_index(shard) == 6
    assert (index_path(shard).stat().st_mtime_ns, index_path(shard).stat().st_ino) == before


def test_the_index_follows_a_changed_shard(shard: Path) -> None:
    ensure_index(shard)
    write_tar(shard, {"a.png": PNG})  # another size
    assert ensure_index(shard) == 1
    write_tar(shard, {"b.png": PNG})  # the same size, written later
    os.utime(shard, ns=(0, index_path(shard).stat().st_mtime_ns + 1))
    ensure_index(shard)
    assert open_index(index_path(shard))["key"].tolist() == [b"b"]


def test_a_half_written_index_is_rebuilt(shard: Path) -> None:
    ensure_index(shard)
    whole = index_path(shard).read_bytes()
    for size in (0, 10, len(whole) - 1):
        cut(index_path(shard), size)
        assert ensure_index(shard) == 6
        assert index_path(shard).read_bytes() == whole


def test_a_folder_without_room_for_the_index(shard: Path) -> None:
    index_path(shard).mkdir()  # stands for a read-only folder, which root could write to
    with pytest.raises(ValueError, match=r"cannot write the index .* tools/pack.py --index .*x.tar`"):
        build_index(shard)
    assert not list(shard.parent.glob(".*tmp"))


def test_changed_bytes_are_noticed(shard: Path) -> None:
    reader = Reader([shard])
    reader.read(0, 1)
    overwrite(shard, list(scan(shard))[2].offset + 40, b"changed")
    with pytest.raises(TrainingError, match=r"x.tar: was replaced while it is in use"):
        reader.read(0, 2)


def test_few_files_stay_open(tmp_path: Path) -> None:
    shards = [write_tar(tmp_path / f"{i}.tar", {f"k{i}.png": PNG}) for i in range(MAX_OPEN + 5)]
    reader = Reader(shards)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        assert [reader.read(i, 0).key for i in range(len(shards))] == [f"k{i}" for i in range(len(shards))]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 2 * MAX_OPEN  # tar and index
    assert pickle.loads(pickle.dumps(reader)).read(3, 0).key == "k3"


def test_fewer_stay_open_where_the_system_allows_few(tmp_path: Path) -> None:
    shards = [write_tar(tmp_path / f"{i}.tar", {f"k{i}.png": PNG}) for i in range(70)]
    for shard in shards:
        build_index(shard)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        reader = Reader(shards, max_open=100, attempts=1)
        assert [reader.read(i, 0).key for i in range(70)] == [f"k{i}" for i in range(70)]
        reader.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_is_killed_while_it_indexes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "available_cores", lambda: 2)  # one core would index in this process
    with pytest.raises(InputError, match="a process that builds indexes was killed"):
        list(in_processes(signal.raise_signal, [signal.SIGKILL] * 8))
