"""Shards made to harm or to confuse: one line each, bounded time and memory, no file outside."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import pytest

from pretrain.data.corrupt import CorruptLog
from pretrain.data.groups import sample_groups
from pretrain.data.index import HEADER, index_path, indexed_samples, read_header
from pretrain.data.indexing import build_index
from pretrain.data.reader import CorruptSample, Reader
from pretrain.data.tar import scan
from pretrain.data.verify import verify_shard
from pretrain.errors import InputError
from tests.data.packing import pack, packed, picture, write_tar


def pax_tar(path: Path, header: bytes) -> Path:
    """A tar whose one member follows a pax header of any content."""
    extension = tarfile.TarInfo("x")
    extension.type, extension.size = tarfile.XHDTYPE, len(header)
    member = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(extension.tobuf(tarfile.USTAR_FORMAT) + header + bytes(-len(header) % 512) + member)
    return path


def change_record(shard: Path, offset: int, size: int) -> None:
    """Let the index place the first image elsewhere."""
    index = index_path(shard)
    content = bytearray(index.read_bytes())
    struct.pack_into("<QI", content, HEADER.size + read_header(index).key_bytes, offset, size)
    index.write_bytes(content)


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        pytest.param(b"14 size=-1536\n", "damaged tar header", id="a size that leads back"),
        pytest.param(b"6 a=b\n" * 200_000, "extension header of 1200000 bytes", id="endless lines"),
        pytest.param(b"99 path=a\n", "damaged pax header", id="a line longer than the header"),
        pytest.param(b"4 a=b\n", "damaged pax header", id="a line shorter than it is"),
        pytest.param(b"5010 path=" + 4999 * b"k" + b"\n", "a name of 4999 letters", id="an endless name"),
    ],
)
def test_a_pax_header_that_does_not_add_up(header: bytes, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=fault) as error:
        list(scan(pax_tar(tmp_path / "x.tar", header)))
    assert str(error.value).startswith(f"{tmp_path / 'x.tar'}: byte ")


@pytest.mark.parametrize("label", [5000 * b"9", 30 * b"9", b"-1", b"1.5"])
def test_a_class_number_that_no_index_can_hold(label: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a.jpg": picture(0), "a.cls": label})
    with pytest.raises(InputError, match=r"a\.cls holds b'.*', not a class number"):
        build_index(shard)
    pack(shard, tmp_path / "out", status=2)
    (line,) = (tmp_path / "out/unreadable-train.txt").read_text().splitlines()
    assert "not a class number" in line


def test_a_member_that_is_read_at_once_is_bounded(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 2**31
    path = tmp_path / "x.tar"
    with path.open("wb") as file:  # a hole: it takes no room on the disk
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.seek(2**31 + 512)
        file.write(bytes(1024))
    with pytest.raises(InputError, match=r"a\.jpg has 2147483648 bytes, more than"):
        build_index(path)


@pytest.mark.parametrize(("offset", "size"), [(2**63 + 5, 10), (512, 0xF0000000), (2**64 - 1, 2**32 - 1)])
def test_an_index_that_points_beyond_its_tar(offset: int, size: int, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a.jpg": picture(0)})
    build_index(shard)
    change_record(shard, offset, size)
    with pytest.raises(CorruptSample, match="its bytes differ from the index"):
        Reader([shard]).read(0, 0)
    assert [fault.reason for fault in verify_shard(shard)] == [
        "does not lie where the index says; build it anew with --index"
    ]


def test_an_index_with_keys_of_four_gigabytes_is_none(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a.jpg": picture(0)})
    build_index(shard)
    content = bytearray(index_path(shard).read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    index_path(shard).write_bytes(content)
    assert indexed_samples(shard) is None


def test_notes_nested_without_end(tmp_path: Path) -> None:
    deep = 100_000 * b"["
    shard = write_tar(tmp_path / "x.tar", {"a.jpg": picture(0), "a.json": deep})
    build_index(shard)
    (fault,) = verify_shard(shard)
    assert fault.reason.startswith("is not JSON (maximum recursion depth")
    with pytest.raises(InputError, match=r"x\.tar: its \.json members cannot be read"):
        sample_groups([str(shard)], "--test", "patient")
    assert "not one image can be read" in pack(shard, tmp_path / "out", status=2).stderr


def test_groups_are_not_read_from_a_compressed_tar(tmp_path: Path) -> None:
    """Reading one through tarfile would unpack it: a few kilobytes could become many gigabytes."""
    plain = write_tar(tmp_path / "plain.tar", {"a.jpg": picture(0), "a.json": b'{"patient": "p"}'})
    assert sample_groups([str(plain)], "--test", "patient") == ["p"]
    (tmp_path / "x.tar").write_bytes(gzip.compress(plain.read_bytes() + bytes(1 << 20)))
    with pytest.raises(InputError, match="is not an uncompressed tar file"):
        sample_groups([str(tmp_path / "x.tar")], "--test", "patient")


def odd_tar(path: Path, target: Path) -> Path:
    """A tar with everything that leads elsewhere, and two images."""
    kinds = {
        "link.jpg": tarfile.SYMTYPE,
        "hard.jpg": tarfile.LNKTYPE,
        "tty.jpg": tarfile.CHRTYPE,
        "disk.jpg": tarfile.BLKTYPE,
        "pipe.jpg": tarfile.FIFOTYPE,
        "folder.jpg": tarfile.DIRTYPE,
    }
    with tarfile.open(path, "w") as tar:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(target)
            tar.addfile(info)
        for name in ("../../outside.jpg", "/outside.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(picture(1))
            tar.addfile(info, io.BytesIO(picture(1)))
    return path


def test_links_and_devices_are_no_images_and_no_name_leads_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(picture(9))
    (tmp_path / "in").mkdir()
    shard = odd_tar(tmp_path / "in/x.tar", secret)
    assert [member.name for member in scan(shard)] == ["../../outside.jpg", "/outside.jpg"]
    assert build_index(shard) == 2
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    pack(shard, tmp_path / "out")
    assert [sample.key for sample in packed(tmp_path / "out")] == ["000000000", "000000001"]
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.parent for path in made} == {tmp_path / "out"}
    assert not (tmp_path.parent / "outside.jpg").exists() and not Path("/outside.jpg").exists()


def test_names_that_steer_a_terminal_or_are_no_letters(tmp_path: Path) -> None:
    name = b"a\x1b]0;owned\x07\n\xff\tb"
    info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape") + ".jpg")
    info.size = 1
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"x"))
    build_index(tmp_path / "x.tar")
    (line,) = pack("--verify", tmp_path / "x.tar", status=1).stdout.splitlines()[:-1]
    assert line.isprintable() and "\\x1b]0;owned\\x07" in line
    log = CorruptLog(tmp_path / "corrupt.tsv", 1.0)
    log.add(1, [CorruptSample("s\udcff.tar", "a\tb\n\x1b[31m", "no\nreason")])
    assert (tmp_path / "corrupt.tsv").read_text() == "s\\udcff.tar\ta b \\x1b[31m\tno reason\n"
    again = CorruptLog(tmp_path / "corrupt.tsv", 1.0)
    again.add(1, [CorruptSample("s\udcff.tar", "a\tb\n\x1b[31m", "no\nreason")])
    assert (tmp_path / "corrupt.tsv").read_text().count("\n") == 1
