import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config.schema import Config
from pretrain.data.corrupt import CorruptLog
from pretrain.data.index import index_path
from pretrain.data.loader import TrainLoader
from pretrain.data.reader import CorruptSample, Reader
from pretrain.data.tar import scan
from pretrain.errors import InputError, TrainingError
from tests.data.conftest import GLOBAL_BATCH

MakeConfig = Callable[..., Config]


@pytest.fixture
def copy(shard_folder: Path, tmp_path: Path) -> Path:
    """Of a shard of 15 samples, without an index."""
    shard = tmp_path / "copy.tar"
    shard.write_bytes((shard_folder / "train-000000.tar").read_bytes())
    return shard


def overwrite(shard: Path, key: str, content: bytes) -> None:
    """Write over the first bytes of a sample's image."""
    member = next(member for member in scan(shard) if member.name == f"{key}.jpg")
    with shard.open("r+b") as file:
        file.seek(member.offset)
        file.write(content[: member.size])


def crops(cfg: Config) -> list[str]:
    """A hash of each image's first global crop, by position."""
    loader = TrainLoader(cfg, torch.device("cpu"), GLOBAL_BATCH, folder=Path(cfg.run.dir))
    batches = [batch for _, batches in loader.steps(0, 1) for batch in batches]
    return [hashlib.sha256(crop.numpy().tobytes()).hexdigest() for crop in batches[0].global_crops[:15]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_is_replaced_and_named(
    make_config: MakeConfig, copy: Path, tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    overwrite(copy, "000004", bytes(100_000))
    overwrite(copy, "000005", bytes(100_000))
    cfg = make_config(shards=[str(copy)], shuffle="none", workers=workers, run_dir=str(tmp_path / "run"))
    found = crops(cfg)
    assert len(set(found)) == 15  # what replaces a sample is cut anew
    report = (tmp_path / "run" / "corrupt.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in report] == [[str(copy), "000004"], [str(copy), "000005"]]
    assert f"corrupt, replaced by the next one: {copy}: sample 000004: " in capfd.readouterr().err
    assert crops(cfg) == found
    assert len((tmp_path / "run" / "corrupt.tsv").read_text().splitlines()) == 2  # each is named once


def test_the_others_stay_as_they_are(make_config: MakeConfig, copy: Path) -> None:
    cfg = make_config(shards=[str(copy)], shuffle="none")
    before = crops(cfg)
    index_path(copy).unlink()
    overwrite(copy, "000004", b"GIF89a not")
    after = crops(cfg)
    assert [a == b for a, b in zip(before, after, strict=True)] == [i != 4 for i in range(15)]


def test_too_many_end_the_run(make_config: MakeConfig, copy: Path) -> None:
    overwrite(copy, "000004", bytes(50))
    cfg = make_config(shards=[str(copy)], shuffle="none", max_corrupt=0.0)
    with pytest.raises(InputError, match=r"data.max_corrupt=0: 1 of \d+ samples .* 000004: .*corrupt.tsv$"):
        crops(cfg)


def test_a_shard_of_corrupt_samples_only(make_config: MakeConfig, copy: Path) -> None:
    for number in range(15):
        overwrite(copy, f"{number:06d}", bytes(50))
    with pytest.raises(InputError, match="100 samples in a row are corrupt"):
        crops(make_config(shards=[str(copy)], max_corrupt=1.0))


def test_the_share_counts_from_a_thousand(tmp_path: Path) -> None:
    log = CorruptLog(tmp_path / "x.tsv", 0.01)
    sample = CorruptSample("a.tar", "k", "two\nlines")
    log.add(10, [sample] * 10)
    assert (tmp_path / "x.tsv").read_text() == "a.tar\tk\ttwo lines\n"
    log.add(2_000, [sample] * 10)
    with pytest.raises(InputError, match="21 of 2031"):
        CorruptLog.add(log, 0, [sample])


def test_bit_rot_is_a_corrupt_sample(copy: Path) -> None:
    reader = Reader([copy])
    stamp = copy.stat()
    overwrite(copy, "000002", b"\xff\xd8 changed")
    os.utime(copy, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert reader.read(0, 1).key == "000001"
    with pytest.raises(CorruptSample, match=r"copy.tar: sample 000002: its bytes differ from the index"):
        reader.read(0, 2)


def test_a_shard_that_is_written_over_is_named(copy: Path) -> None:
    reader = Reader([copy])
    reader.read(0, 0)
    copy.write_bytes(np.random.default_rng(0).integers(0, 256, copy.stat().st_size, np.uint8).tobytes())
    with pytest.raises(TrainingError, match=r"copy.tar: was replaced while it is in use"):
        reader.read(0, 1)


def test_a_shard_that_is_renamed_over_is_named_when_it_is_opened_again(copy: Path) -> None:
    reader = Reader([copy])
    reader.read(0, 0)
    (copy.parent / "new").write_bytes(copy.read_bytes())
    (copy.parent / "new").replace(copy)
    assert reader.read(0, 1).key == "000001"  # the file that was opened is still there
    reader.close()
    with pytest.raises(TrainingError, match=r"copy.tar: was replaced while it is in use"):
        reader.read(0, 1)


def test_a_shard_cut_short_does_not_kill_the_reader(copy: Path) -> None:
    reader = Reader([copy])
    reader.read(0, 0)
    os.truncate(copy, 1000)
    with pytest.raises(TrainingError, match="was replaced"):
        reader.read(0, 14)
    os.truncate(index_path(copy), 100)
    with pytest.raises(InputError, match=r"idx: was cut short while it was read"):
        reader.read(0, 14)
