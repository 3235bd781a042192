import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset as wds

from pretrain.data.index import index_path
from pretrain.data.reader import Reader
from tests.data.packing import pack, picture

TOOL = Path(__file__).parents[2] / "tools" / "pack.py"


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes of four images, one of them damaged, and a text file."""
    src = tmp_path / "photos"
    for name in ("dog", "cat"):
        (src / name / "sub").mkdir(parents=True)
        for i in range(3):
            (src / name / f"p{i}_x.JPG").write_bytes(picture(10 * i + (name == "dog")))
        (src / name / "sub" / "p3_y.png").write_bytes(picture(99, "PNG"))
    (src / "dog" / "p0_x.JPG").write_bytes(picture(0)[:200])
    (src / "readme.txt").write_text("notes")
    return src


def read_all(dst: Path, prefix: str = "train") -> list[dict]:
    shards = sorted(str(path) for path in dst.glob(f"{prefix}-*.tar"))
    return list(wds.WebDataset(shards, shardshuffle=False))


pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"  # webdataset's reader leaves files open
)


def test_a_folder_of_classes(classes: Path, tmp_path: Path) -> None:
    dst = tmp_path / "data"
    result = pack(classes, dst, "--samples-per-shard", 3, "--group-from", "parent")
    assert result.stdout.splitlines()[-1] == (
        f"7 images in 3 shards in {dst}; 2 files not packed (listed in {dst}/unreadable-train.txt)"
    )
    assert "shuffled with seed 0" in result.stdout
    assert json.loads((dst / "classes.json").read_text()) == ["cat", "dog"]
    unreadable = (dst / "unreadable-train.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in unreadable] == ["readme.txt", "dog/p0_x.JPG"]
    samples = read_all(dst)
    assert sorted(json.loads(sample["json"])["source"] for sample in samples) == sorted(
        [f"cat/p{i}_x.JPG" for i in range(3)]
        + [f"dog/p{i}_x.JPG" for i in (1, 2)]
        + [f"{c}/sub/p3_y.png" for c in ("cat", "dog")]
    )
    for sample in samples:
        meta = json.loads(sample["json"])
        path = classes / meta["source"]
        assert sample[path.suffix[1:].lower()] == path.read_bytes()
        assert int(sample["cls"]) == meta["label"] == ["cat", "dog"].index(meta["label_name"])
        assert meta["label_name"] == Path(meta["source"]).parts[0]
        assert meta["group"] == path.parent.name
    assert Reader(sorted(dst.glob("*.tar"))).sizes == [3, 3, 1]
    assert not list(dst.glob(".*"))


def test_it_runs_as_a_script(classes: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), str(classes), str(tmp_path / "data")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("\n") == 2
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert subprocess.run(command[:2], capture_output=True, check=False).returncode == 2


def test_seeds_change_the_order_only(classes: Path, tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack(classes, tmp_path / name, "--shuffle-seed", seed)
        orders.append([json.loads(sample["json"])["source"] for sample in read_all(tmp_path / name)])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != sorted(orders[0])


def test_zero_padded_class_folders_are_names(classes: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(sorted(path for path in classes.iterdir() if path.is_dir())):
        folder.rename(classes / f"{number:02d}")
    pack(classes, tmp_path / "data")
    assert json.loads((tmp_path / "data" / "classes.json").read_text())[:2] == ["00", "01"]


def test_a_damaged_list_of_classes_is_one_line(classes: Path, tmp_path: Path) -> None:
    pack(classes, tmp_path / "data")
    for text in ("{", "3", '{"cat": 0}', "[" * 100_000):
        (tmp_path / "data" / "classes.json").write_text(text)
        result = pack(classes, tmp_path / "data", "--prefix", "test", status=2)
        assert "not a list of class names" in result.stderr


def test_each_prefix_keeps_its_list_of_unreadable_files(classes: Path, tmp_path: Path) -> None:
    for prefix in ("train", "test"):
        pack(classes, tmp_path / "data", "--prefix", prefix)
    assert (tmp_path / "data" / "unreadable-train.txt").exists()
    assert (tmp_path / "data" / "unreadable-test.txt").exists()


def test_a_flat_folder_has_no_labels(classes: Path, tmp_path: Path) -> None:
    pack(classes / "cat" / "sub", tmp_path / "data", "--group-from", r"(p\d)_")
    (sample,) = read_all(tmp_path / "data")
    assert "cls" not in sample and json.loads(sample["json"])["group"] == "p3"
    assert not (tmp_path / "data" / "classes.json").exists()


def test_a_list_with_labels_and_groups(classes: Path, tmp_path: Path) -> None:
    names = ["cat/p0_x.JPG\t3\tanna", "dog/p1_x.JPG\t0\tben", "dog/missing.jpg\t1"]
    (classes / "list.txt").write_text("\n".join(names) + "\n")
    result = pack(classes / "list.txt", tmp_path / "data")
    assert "1 files not packed" in result.stdout
    assert "No such file" in (tmp_path / "data" / "unreadable-train.txt").read_text()
    found = {s["cls"]: json.loads(s["json"])["group"] for s in read_all(tmp_path / "data")}
    assert found == {b"3": "anna", b"0": "ben"}


def test_a_list_that_begins_with_the_mark_of_windows(classes: Path, tmp_path: Path) -> None:
    (classes / "list.txt").write_text("cat/p0_x.JPG\r\ncat/p1_x.JPG\r\n", encoding="utf-8-sig")
    assert "2 images in 1 shards" in pack(classes / "list.txt", tmp_path / "data").stdout


def test_a_second_prefix_shares_the_class_numbers(classes: Path, tmp_path: Path) -> None:
    dst = tmp_path / "data"
    pack(classes, dst)
    shutil.rmtree(classes / "cat")
    pack(classes, dst, "--prefix", "test")
    assert {sample["cls"] for sample in read_all(dst, "test")} == {b"1"}  # dog, as in train
    (classes / "dog").rename(classes / "bird")
    error = pack(classes, dst, "--prefix", "other", status=2).stderr
    assert "class bird is not in the classes.json" in error


def test_existing_shards_are_safe(classes: Path, tmp_path: Path) -> None:
    dst = tmp_path / "data"
    pack(classes, dst, "--samples-per-shard", 2)
    before = {path: path.read_bytes() for path in dst.iterdir()}
    error = pack(classes, dst, status=2).stderr
    assert error.count("\n") == 1 and "has 4 train-*.tar already; --force replaces them" in error
    pack(tmp_path / "none", dst, "--force", status=2)
    pack(classes, dst, "--force", "--samples-per-shard", 0, status=2)
    assert {path: path.read_bytes() for path in dst.iterdir()} == before
    pack(classes, dst, "--force")
    assert len(list(dst.glob("*.tar"))) == 1 == len(list(dst.glob("*.idx")))


def test_two_kinds_in_a_folder_are_refused(classes: Path, tmp_path: Path) -> None:
    (classes / "cat" / "scan.dcm").write_bytes(b"")
    error = pack(classes, tmp_path / "data", status=2).stderr
    assert "holds images (p0_x.JPG) and DICOM files (scan.dcm)" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "0", "1"], "--window: is for DICOM files and NIfTI volumes; photos holds images"),
        (["--axis", "0"], "--axis: is for NIfTI volumes; photos holds images"),
        (["--image-column", "x"], "--image-column: is for parquet files; photos holds images"),
        (["--label-column", "x"], "--label-column: is for parquet files; photos holds images"),
    ],
)
def test_options_of_another_kind_are_refused(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in pack("photos", "data", *arguments, status=2).stderr


def test_index_of_existing_shards(classes: Path, tmp_path: Path) -> None:
    pack(classes, tmp_path)
    index_path(tmp_path / "train-000000.tar").unlink()
    assert pack("--index", tmp_path / "*.tar").stdout == "7 samples in 1 shards indexed\n"
    assert index_path(tmp_path / "train-000000.tar").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "data"], "no such folder or list"),
        (["empty", "data"], "holds no image"),
        (["mixed", "data"], "images and sub-folders with images"),
        (["list.txt", "data"], "1 of 2 lines have no label"),
        (["mixed/cat/sub", "data", "--group-from", "("], "not a regular expression"),
        (["mixed/cat/sub", "data", "--group-from", "q[0-9]"], "does not match"),
        (["mixed/cat/sub", "data", "--group-from", "(q)|p"], "its first group takes no part in the match"),
        (["mixed/cat/sub", "data", "--samples-per-shard", "0"], "--samples-per-shard 0: must be at least 1"),
        (["broken", "data"], "not one image can be read"),
        (["--index", "empty/*.tar"], "no shard matches"),
        (["--verify", "empty/*.tar"], "no shard matches"),
        (["mixed", "data", "--index", "x.tar"], "take shards only, not mixed"),
        (["mixed"], "give SRC and DST"),
    ],
)
def test_bad_input_is_one_line(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    classes.rename("mixed")
    Path("mixed/top.jpg").write_bytes(picture(0))
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.jpg").write_bytes(b"no")
    Path("list.txt").write_text("mixed/cat/p0_x.JPG\t1\nmixed/cat/p1_x.JPG\n")
    error = pack(*arguments, status=2).stderr
    assert message in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("pack.py: ")
    assert not list(tmp_path.glob("data/*.tar"))
