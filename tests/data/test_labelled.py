import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config.schema import DecodeConfig
from pretrain.data.labelled import labelled_batches
from pretrain.data.writer import PackedSample, write_shards
from pretrain.errors import InputError
from tests.data.packing import picture, write_tar
from tests.data.pictures import encode

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.5]


def shards_of(folder: Path, pictures: list[np.ndarray], labels: list[int | None]) -> list[str]:
    samples = [
        PackedSample(f"{i}", "png", encode(picture, "PNG"), label, {})
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))
    ]
    return [str(path) for path in write_shards(samples, folder, "x", 2)]


def pixels_of(images: torch.Tensor) -> np.ndarray:
    pixels = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_stored_order_labels_and_batch_sizes(tmp_path: Path) -> None:
    pictures = [np.full((32, 32, 3), 10 * i, np.uint8) for i in range(7)]
    shards = shards_of(tmp_path, pictures, [6, 5, 4, 3, 2, 1, 0])
    batches = list(labelled_batches(shards, "log.knn.train", 32, 32, MEAN, STD, 3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert batches[0][1].dtype == torch.int64 and batches[0][0].dtype == torch.float32
    assert pixels_of(torch.cat([images for images, _ in batches]))[:, 0, 0, 0].tolist() == [
        10 * i for i in range(7)
    ]


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_equal_pillows(images: dict[str, np.ndarray], tmp_path: Path, turned: bool) -> None:
    picture = images["china"].transpose(1, 0, 2) if turned else images["china"]
    picture = np.ascontiguousarray(picture)
    shards = shards_of(tmp_path, [picture], [0])
    ((batch, _),) = labelled_batches(shards, "log.knn.train", 128, 112, MEAN, STD, 4)
    size = (128, 170) if turned else (170, 128)
    resized = Image.open(io.BytesIO(encode(picture, "PNG"))).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 112) / 2), round((size[1] - 112) / 2)
    np.testing.assert_array_equal(
        pixels_of(batch)[0], np.asarray(resized.crop((left, top, left + 112, top + 112)))
    )


def test_a_fitting_image_is_untouched(images: dict[str, np.ndarray], tmp_path: Path) -> None:
    picture = np.ascontiguousarray(images["noise"][:64, :64])
    ((batch, _),) = labelled_batches(
        shards_of(tmp_path, [picture], [0]), "log.knn.test", 64, 64, MEAN, STD, 4
    )
    np.testing.assert_array_equal(pixels_of(batch)[0], picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_images_have_the_wanted_channels(
    images: dict[str, np.ndarray], tmp_path: Path, channels: int
) -> None:
    gray = Image.fromarray(images["china"]).convert("L")
    shards = shards_of(tmp_path, [np.asarray(gray)], [0])
    scaling = ([0.0] * channels, [1.0] * channels)
    ((batch, _),) = labelled_batches(shards, "log.knn.test", 128, 112, *scaling, 4, channels)
    resized = np.asarray(gray.resize((170, 128), Image.Resampling.BICUBIC))[8:120, 29:141]
    expected = np.broadcast_to(resized, (1, channels, 112, 112))
    np.testing.assert_array_equal((batch * 255).round().numpy(), expected)


def test_levels_are_seen_through_the_window(tmp_path: Path) -> None:
    levels = np.linspace(0, 4095, 32 * 32).astype(np.uint16).reshape(32, 32)
    decoding = DecodeConfig(window=[0, 4095])
    shards = shards_of(tmp_path, [levels], [0])
    ((batch, _),) = labelled_batches(shards, "log.knn.test", 32, 32, [0.0], [1.0], 4, 1, decoding)
    np.testing.assert_array_equal((batch[0, 0] * 255).round(), np.rint(levels / 4095 * 255))


def test_other_channels_name_setting_shard_and_key(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [np.zeros((8, 8, 3), np.uint8)], [0])
    fault = r"^log.knn.test: .*x-000000.tar: sample 0: has 3 channels, data.channels=5; re-pack"
    with pytest.raises(InputError, match=fault):
        next(labelled_batches(shards, "log.knn.test", 8, 8, [0.0] * 5, [1.0] * 5, 2, 5))


def test_a_missing_label_names_setting_shard_and_key(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    shards = shards_of(tmp_path, [picture] * 3, [0, 0, None])
    with pytest.raises(ValueError, match=r"^log.knn.test: .*x-000001.tar: sample 2 has no label"):
        list(labelled_batches(shards, "log.knn.test", 8, 8, MEAN, STD, 2))


def test_an_image_without_bytes_names_setting_shard_and_key(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a.jpg": picture(0), "a.cls": b"0", "b.jpg": b"", "b.cls": b"1"})
    fault = r"^log.knn.test: .*x.tar: sample b: has zero bytes; re-pack the shard without it$"
    with pytest.raises(InputError, match=fault):
        list(labelled_batches([str(shard)], "log.knn.test", 8, 8, MEAN, STD, 2))


def test_shards_without_a_sample_name_the_setting(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {})
    with pytest.raises(InputError, match=r"^log.knn.test: the shards hold no sample$"):
        next(labelled_batches([str(shard)], "log.knn.test", 8, 8, MEAN, STD, 2))


def test_crop_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^log.knn.train: .*crop of 9 .*side of 8"):
        next(labelled_batches([], "log.knn.train", 8, 9, MEAN, STD, 2))
