from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from pretrain.data.index import index_path
from pretrain.data.reader import Reader
from pretrain.data.writer import PackedSample, write_shards
from tests.data.pictures import encode

JPEG = encode(np.zeros((8, 8, 3), np.uint8))


def samples(count: int) -> Iterator[PackedSample]:
    return (PackedSample(f"{i:03d}", "jpg", JPEG, i, {"number": i}) for i in range(count))


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [3]), (4, [4]), (9, [4, 4, 1])])
def test_shards_and_indexes(tmp_path: Path, count: int, sizes: list[int]) -> None:
    shards = write_shards(samples(count), tmp_path / "new", "val", 4)
    assert [path.name for path in shards] == [f"val-{i:06d}.tar" for i in range(len(sizes))]
    written = {index_path(shard): index_path(shard).stat().st_mtime_ns for shard in shards}
    assert Reader(shards).sizes == sizes
    assert written == {
        path: path.stat().st_mtime_ns for path in written
    }  # the index was valid, not built anew
    assert len(list((tmp_path / "new").iterdir())) == 2 * len(sizes)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its reader leaves files open
def test_webdataset_reads_them(tmp_path: Path) -> None:
    shards = [str(path) for path in write_shards(samples(7), tmp_path, "train", 3)]
    read = list(wds.WebDataset(shards, shardshuffle=False).decode())
    assert [(s["__key__"], s["cls"], s["json"]) for s in read] == [
        (f"{i:03d}", i, {"number": i}) for i in range(7)
    ]
    assert next(iter(wds.WebDataset(shards, shardshuffle=False)))["jpg"] == JPEG


def test_equal_samples_give_equal_shards(tmp_path: Path) -> None:
    first, second = (write_shards(samples(3), tmp_path / name, "x", 3)[0] for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_an_interruption_leaves_whole_shards_only(tmp_path: Path) -> None:
    def interrupted() -> Iterator[PackedSample]:
        yield from samples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path, "x", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-000000.tar", "x-000000.tar.idx"]
    assert Reader([tmp_path / "x-000000.tar"]).sizes == [3]


@pytest.mark.parametrize(
    ("key", "size", "message"), [("a.b", 2, "'a.b': a dot"), ("a", 0, "at least 1, not 0")]
)
def test_bad_input(tmp_path: Path, key: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards([PackedSample(key, "jpg", JPEG, None, {})], tmp_path, "x", size)
