import json
import shutil
import tarfile
from pathlib import Path

import pytest

from pretrain.data.indexing import build_index
from tests.data.packing import fault, pack, packed, picture, write_tar


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of eight samples, one class each: sorted as badly as can be."""
    folder = tmp_path / "old"
    folder.mkdir()
    for label in range(3):
        members = {}
        for i in range(8):
            key = f"c{label}/{label}{i:02d}"
            members[f"{key}.jpg"] = picture(50 * label + i)
            members[f"{key}.cls"] = str(label).encode()
            members[f"{key}.json"] = json.dumps({"url": f"u{label}{i}", "ratio": 0.1, "no": None}).encode()
        write_tar(folder / f"{label:05d}.tar", members)
    return folder


def test_samples_are_mixed_and_kept(tars: Path, tmp_path: Path) -> None:
    result = pack(tars, tmp_path / "new", "--samples-per-shard", 10)
    assert result.stdout.splitlines()[0] == ("24 images, 0 classes; order shuffled over 3 tars with seed 0")
    assert "24 images in 3 shards" in result.stdout.splitlines()[-1]
    samples = packed(tmp_path / "new")
    assert [sample.key for sample in samples] == [f"{i:09d}" for i in range(24)]
    assert len({sample.label for sample in samples[:10]}) == 3
    for sample in samples:
        label, number = int(sample.meta["source"][3]), int(sample.meta["source"][4:])
        assert sample.meta["source"] == f"c{label}/{label}{number:02d}"
        assert sample.image == picture(50 * label + number)
        assert sample.label == sample.meta["label"] == label
        assert (sample.meta["url"], sample.meta["ratio"], sample.meta["no"]) == (
            f"u{label}{number}",
            0.1,
            None,
        )
    assert len({sample.meta["source"] for sample in samples}) == 24


@pytest.mark.parametrize("window", [["a", "b"], [[1], [2]], [1], 3])
def test_notes_that_look_like_ours(window: object, tmp_path: Path) -> None:
    notes = json.dumps({"window": window, "units": "HU"}).encode()
    pack(write_tar(tmp_path / "x.tar", {"a.jpg": picture(1), "a.json": notes}), tmp_path / "new")
    (sample,) = packed(tmp_path / "new")
    assert sample.meta["window"] == window


def test_what_we_packed_keeps_its_names_and_classes(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "photos" / name / f"{i}.jpg").write_bytes(picture(i))
    pack(tmp_path / "photos", tmp_path / "old", "--group-from", "parent")
    pack(tmp_path / "old", tmp_path / "new", "--shuffle-seed", 5)
    old, new = packed(tmp_path / "old"), packed(tmp_path / "new")
    assert sorted(str(sample[1:]) for sample in old) == sorted(str(sample[1:]) for sample in new)
    assert [sample.meta["source"] for sample in old] != [sample.meta["source"] for sample in new]
    assert json.loads((tmp_path / "new" / "classes.json").read_text()) == ["ant", "bee"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "classes.json").write_text('["bee", "ant"]')
    assert "pack to another folder" in fault(tmp_path / "old", tmp_path / "other")


def test_groups_by_the_key(tars: Path, tmp_path: Path) -> None:
    pack(tars, tmp_path / "a", "--group-from", "parent")
    assert {sample.meta["group"] for sample in packed(tmp_path / "a")} == {"c0", "c1", "c2"}
    pack(tars, tmp_path / "b", "--group-from", r"/(\d)")
    assert {sample.meta["group"] for sample in packed(tmp_path / "b")} == {"0", "1", "2"}
    assert "does not match c0/000" in fault(tars, tmp_path / "c", "--group-from", "x")
    assert not (tmp_path / "c").exists()


def test_samples_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "x.tar",
        {
            **{"good.png": picture(1, "PNG"), "good.txt": b"caption"},
            **{"bad.jpg": picture(1)[:100]},
            **{"alone.json": b"{}"},
            **{"list.jpg": picture(2), "list.json": b"[1]"},
            **{"torn.jpg": picture(3), "torn.json": b"{"},
            **{"named.jpg": picture(4), "named.cls": b"dog"},
        },
    )
    result = pack(tar, tmp_path / "new")
    assert "members that are not kept: .txt" in result.stdout
    assert "1 images in 1 shards" in result.stdout and "5 files not packed" in result.stdout
    lines = (tmp_path / "new" / "unreadable-train.txt").read_text().splitlines()
    reasons = dict(line.split("\t") for line in lines)
    assert set(reasons) == {f"x.tar: {key}" for key in ("bad", "alone", "list", "torn", "named")}
    assert reasons["x.tar: alone"] == "has no image"
    assert reasons["x.tar: named"] == "its .cls holds b'dog', not a class number"


def test_what_is_read_is_not_replaced(tars: Path, tmp_path: Path) -> None:
    pack(tars, tmp_path / "new")
    before = (tmp_path / "new" / "train-000000.tar").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for src in (tmp_path / "new", tmp_path / "new" / "train-000000.tar", tmp_path / "link"):
        assert "is to be packed itself" in fault(src, tmp_path / "new", "--force")
    assert (tmp_path / "new" / "train-000000.tar").read_bytes() == before
    pack(tmp_path / "new", tmp_path / "new", "--prefix", "mixed", "--shuffle-seed", 1)
    assert len(packed(tmp_path / "new", "mixed")) == 24


def test_repeated_members_become_samples(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", picture(1)), ("a.jpg", picture(2))])
    with pytest.raises(ValueError, match="is in the shard twice; re-pack it"):
        build_index(tar)
    pack(tar, tmp_path / "new")
    assert sorted(sample.image for sample in packed(tmp_path / "new")) == sorted([picture(1), picture(2)])


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    names = {"a.jpg": picture(1), "b.jpg": picture(2), "a.cls": b"1", "b.cls": b"2"}
    pack(write_tar(tmp_path / "x.tar", names), tmp_path / "new")
    found = {sample.meta["source"]: (sample.image, sample.label) for sample in packed(tmp_path / "new")}
    assert found == {"a": (picture(1), 1), "b": (picture(2), 2)}


def test_a_damaged_tar_is_named_before_anything_is_written(tars: Path, tmp_path: Path) -> None:
    content = bytearray((tars / "00001.tar").read_bytes())
    (tars / "00001.tar").write_bytes(content[:5000])
    assert f"{tars / '00001.tar'}: byte" in fault(tars, tmp_path / "new")
    content[3 * 512 + 5] ^= 1
    (tars / "00001.tar").write_bytes(content)
    assert f"{tars / '00001.tar'}: byte" in fault(tars, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_img2dataset_writes_beside_its_tars(tars: Path, tmp_path: Path) -> None:
    for tar in list(tars.glob("*.tar")):
        tar.with_suffix(".parquet").write_bytes(b"a table without images")
        tar.with_name(f"{tar.stem}_stats.json").write_text("{}")
    stdout = pack(tars, tmp_path / "new").stdout
    assert "24 images in 1 shards" in stdout and "6 other files ignored" in stdout
    (tars / "00003.parquet").write_bytes(b"")
    assert "holds tars (00000.tar) and parquet files (00003.parquet)" in fault(tars, tmp_path / "new")


def test_a_list_of_tars(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("old/00000.tar\nold/00002.tar\n")
    pack(tmp_path / "list", tmp_path / "new")
    assert {sample.label for sample in packed(tmp_path / "new")} == {0, 2}
    (tmp_path / "list").write_text("old/00000.tar\t3\n")
    assert "come from their content" in fault(tmp_path / "list", tmp_path / "new2")


def test_folders_that_number_their_classes_differently(tars: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "both" / name).mkdir(parents=True)
        shutil.copy(tars / "00000.tar", tmp_path / "both" / name)
        (tmp_path / "both" / name / "classes.json").write_text(f'["{name}"]')
    assert "number classes differently" in fault(tmp_path / "both", tmp_path / "new")


def test_a_file_that_is_no_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    assert "x.tar: " in fault(tmp_path / "x.tar", tmp_path / "new")
