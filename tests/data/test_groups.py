"""Groups of samples, read from their .json members in the order in which samples are read."""

import io
import tarfile

import pytest

from pretrain.data.groups import sample_groups
from pretrain.data.reader import Reader
from pretrain.data.writer import PackedSample, write_shards
from pretrain.errors import InputError

PNG = b"\x89PNG"


def test_groups_come_in_the_order_of_the_samples(tmp_path):
    samples = [PackedSample(f"s{i}", "png", PNG, i % 2, {"patient": 7 * i % 5}) for i in range(9)]
    shards = write_shards(samples, tmp_path, "a", 4)
    found = sample_groups([str(tmp_path / "a-*.tar")], "--train", "patient")
    assert found == [str(7 * i % 5) for i in range(9)]
    reader = Reader(shards)
    keys = [reader.read(shard, i).key for shard, size in enumerate(reader.sizes) for i in range(size)]
    assert keys == [sample.key for sample in samples]


def test_what_has_no_group_is_refused(tmp_path):
    shard = write_shards([PackedSample("s0", "png", PNG, 0, {"slide": 1})], tmp_path, "a", 4)[0]
    with pytest.raises(InputError, match=r"sample s0 has no 'patient' in a \.json member"):
        sample_groups([str(shard)], "--train", "patient")
    plain = tmp_path / "plain.tar"
    with tarfile.open(plain, "w") as tar:
        info = tarfile.TarInfo("s1.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
    with pytest.raises(InputError, match="sample s1 has no 'slide'"):
        sample_groups([str(plain)], "--train", "slide")
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"broken\.tar: is empty or cut short at byte 6"):
        sample_groups([str(tmp_path / "broken.tar")], "--train", "slide")
