import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.data.inputs.mixing import mix
from pretrain.data.inputs.parquet import extension_of
from pretrain.data.inputs.source import Encoded, Unreadable
from tests.data.packing import fault, pack, packed, picture
from tests.data.pictures import encode

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, rows: int = 1 << 20, notes: dict | None = None, **columns: pa.Array) -> Path:
    path.parent.mkdir(exist_ok=True)
    table = pa.table(columns)
    if notes:
        table = table.replace_schema_metadata({"huggingface": json.dumps(notes)})
    pq.write_table(table, path, row_group_size=rows)
    return path


def images(values: range, names: bool = True) -> pa.Array:
    return pa.array(
        [{"bytes": picture(i), "path": f"p{i}.jpg" if names else None} for i in values], type=IMAGE
    )


def test_files_of_the_hub(tmp_path: Path) -> None:
    notes = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for part in range(2):
        values = range(20 * part, 20 * part + 20)
        labels = pa.array([[part, -1, None][i % 3] for i in values], type=pa.int64())
        write(tmp_path / "hub" / f"train-{part}.parquet", 5, notes, image=images(values), label=labels)
    result = pack(tmp_path / "hub", tmp_path / "new", "--samples-per-shard", 25)
    assert result.stdout.splitlines()[:2] == [
        "40 images, 2 classes; row groups shuffled with seed 0, rows mixed in blocks of 256 MB",
        "images from column image, labels from label",
    ]
    samples = packed(tmp_path / "new")
    order = [int(sample.meta["path"][1:-4]) for sample in samples]
    assert sorted(order) == list(range(40)) and order != sorted(order)
    for i, sample in zip(order, samples, strict=True):
        assert sample.image == picture(i) and sample.extension == "jpg"
        assert sample.meta["source"] == f"train-{i // 20}.parquet#{i % 20}"
        assert sample.label == sample.meta["label"] == [i // 20, None, None][i % 3]
        assert sample.meta["label_name"] == [["cat", "dog"][i // 20], None, None][i % 3]
    assert json.loads((tmp_path / "new" / "classes.json").read_text()) == ["cat", "dog"]


def test_a_plain_column_and_named_labels(tmp_path: Path) -> None:
    table = write(
        tmp_path / "x.parquet",
        png=pa.array([picture(i, "PNG") for i in range(6)], type=pa.large_binary()),
        kind=pa.array(["b", "a", "b", "a", "a", None]).dictionary_encode(),
        label=pa.array([0.5] * 6),  # no label: neither an integer nor a string
    )
    pack(table, tmp_path / "new", "--label-column", "kind", "--group-from", r"#(\d)")
    found = {sample.meta["group"]: (sample.label, sample.extension) for sample in packed(tmp_path / "new")}
    assert found == {str(i): (label, "png") for i, label in enumerate([1, 0, 1, 0, 0, None])}
    assert "labels from none" in pack(table, tmp_path / "other").stdout


def test_rows_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    rows = [
        {"bytes": picture(0), "path": None},
        {"bytes": None, "path": "far/away.jpg"},
        {"bytes": picture(0)[:90], "path": None},
        {"bytes": b"text", "path": None},
        None,
    ]
    write(tmp_path / "x.parquet", image=pa.array(rows, type=IMAGE))
    assert "1 images in 1 shards" in pack(tmp_path / "x.parquet", tmp_path / "new").stdout
    lines = sorted((tmp_path / "new" / "unreadable-train.txt").read_text().splitlines())
    assert lines[0] == "x.parquet#1\tholds no bytes, only the path far/away.jpg"
    assert lines[2:] == ["x.parquet#3\tnot an image in a known format", "x.parquet#4\tis empty"]


def test_columns_that_are_not_clear(tmp_path: Path) -> None:
    binary = pa.array([picture(0)], type=pa.binary())
    table = write(tmp_path / "a" / "two.parquet", one=binary, two=binary, score=pa.array([0.5]))
    assert "2 columns that may hold images (one, two)" in fault(table, tmp_path / "new")
    assert "--image-column score: holds no images; columns: one (binary)" in fault(
        table, tmp_path / "new", "--image-column", "score"
    )
    for name in ("none", "score"):
        error = fault(table, tmp_path / "new", "--image-column", "two", "--label-column", name)
        assert f"--label-column {name}: no column of integers or strings" in error
    pack(table, tmp_path / "new", "--image-column", "two")
    text = write(tmp_path / "b" / "zero.parquet", text=pa.array(["x"]))
    assert "zero.parquet: --image-column: none; columns: text" in fault(text, tmp_path / "new2")
    write(tmp_path / "a" / "unlike.parquet", two=binary, label=pa.array([1]))
    error = fault(tmp_path / "a", tmp_path / "new2", "--image-column", "two")
    assert "unlike.parquet: its columns differ from those of" in error


def test_columns_of_one_name(tmp_path: Path) -> None:
    arrays = [pa.array([picture(0)], type=pa.binary()), pa.array([1]), pa.array([2])]
    pq.write_table(pa.table(arrays, names=["image", "label", "label"]), tmp_path / "x.parquet")
    error = fault(tmp_path / "x.parquet", tmp_path / "new")
    assert "x.parquet: has 2 columns named label; rename them" in error


def test_a_label_that_no_index_can_hold_and_a_path_that_is_none(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.int64())])
    cells = pa.array([{"bytes": picture(i), "path": i} for i in range(2)], type=kind)
    write(tmp_path / "x.parquet", image=cells, label=pa.array([3, 10**18]))
    pack(tmp_path / "x.parquet", tmp_path / "new")
    (sample,) = packed(tmp_path / "new")
    assert sample.label == 3 and "path" not in sample.meta
    lines = (tmp_path / "new" / "unreadable-train.txt").read_text()
    assert lines == "x.parquet#1\tits label 1000000000000000000 is larger than any class number\n"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    table = write(tmp_path / "x.parquet", image=images(range(50)))
    content = bytearray(table.read_bytes())
    table.write_bytes(content[:-20])
    assert "x.parquet: is not a whole parquet file" in fault(table, tmp_path / "new")
    content[4:60] = bytes(56)  # the header of the first page
    table.write_bytes(content)
    error = pack(table, tmp_path / "new", status=2).stderr
    assert "x.parquet: row group 0 is damaged" in error.splitlines()[-1]


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write(tmp_path / "x.parquet", image=images(range(2)))
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert fault(table, tmp_path / "new") == "pack.py: needs pyarrow: pip install pyarrow\n"


def test_blocks_bound_the_memory() -> None:
    results = [Encoded("jpg", bytes(10), i, {}) for i in range(100)] + [Unreadable("x", "y")]
    taken = 0

    def counted():
        nonlocal taken
        for result in results:
            taken += 1
            yield result

    order = []
    for result in mix(counted(), 0, block_bytes=200):
        assert taken - len(order) <= 20
        order.append(result)
    labels = [result.label for result in order if isinstance(result, Encoded)]
    assert sorted(labels) == list(range(100)) and len(order) == 101
    assert [sorted(labels[i : i + 20]) == labels[i : i + 20] for i in range(0, 100, 20)] == [False] * 5
    assert max(labels[:20]) == 19
    assert list(mix(results, 0, 200)) == order != list(mix(results, 1, 200))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_extensions(kind: str) -> None:
    content = encode(np.zeros((4, 4, 3), np.uint8), kind)
    expected = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    assert extension_of(content) == expected
    assert extension_of(b"RIFFxxxxWAVE") is None
