import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from pretrain.batch import Batch
from pretrain.config.schema import AugmentConfig, Config
from pretrain.data.loader import TrainLoader
from pretrain.data.tar import scan
from pretrain.data.writer import PackedSample, write_shards
from tests.data.conftest import GLOBAL_BATCH, GROUP

CPU = torch.device("cpu")
STEPS = 6  # 96 positions of 70 samples: one epoch ends inside a group
MakeConfig = Callable[..., Config]


def make_loader(cfg: Config, rank: int = 0, world_size: int = 1) -> TrainLoader:
    micro_batch = GLOBAL_BATCH // (world_size * cfg.engine.accumulation_steps)
    return TrainLoader(cfg, CPU, micro_batch, rank, world_size)


def images_of(batch: Batch) -> Iterator[tuple[int, str]]:
    """(position, hash of all crops) of each image."""
    count = batch.num_images
    for i in range(count):
        content = (
            batch.global_crops[i::count].numpy().tobytes() + batch.local_crops[i::count].numpy().tobytes()
        )
        yield batch.position + i, hashlib.sha256(content).hexdigest()


def groups_of(batch: Batch) -> Iterator[tuple[int, tuple]]:
    """(first position, masks and drop-path subsets) of each group."""
    count = batch.num_images
    for first in range(0, count, GROUP):
        rows = [crop * count + first + i for crop in range(2) for i in range(GROUP)]
        drop = [rows_of_group(rows, count, first) for rows in (batch.drop_global, batch.drop_local)]
        yield batch.position + first, (batch.masks[rows].numpy().tobytes(), *drop)


def rows_of_group(rows: torch.Tensor | None, count: int, first: int) -> list[list[tuple[int, int]]]:
    """(crop, image in the group) of a group's kept rows, for each block and branch."""
    assert rows is not None
    places = [[divmod(row, count) for row in subset] for subset in rows.flatten(0, 1).tolist()]
    return [[(crop, i - first) for crop, i in subset if first <= i < first + GROUP] for subset in places]


def read(cfg: Config, first: int = 0, last: int = STEPS, rank: int = 0, world_size: int = 1) -> dict:
    """Everything a position holds, by position; checks the steps' numbers and sizes on the way."""
    found: dict = {}
    steps = make_loader(cfg, rank, world_size).steps(first, last)
    for expected, (step, batches) in enumerate(steps, first):
        assert step == expected and len(batches) == cfg.engine.accumulation_steps
        for batch in batches:
            found |= dict(images_of(batch)) | {("masks", place): masks for place, masks in groups_of(batch)}
    return found


@pytest.fixture
def reference(make_config: MakeConfig) -> dict:
    found = read(make_config())
    assert [key for key in found if isinstance(key, int)] == list(range(STEPS * GLOBAL_BATCH))
    return found


@pytest.mark.parametrize("shuffle", ["block", "full"])
def test_crops_of_a_position_differ_between_epochs_and_seeds(make_config: MakeConfig, shuffle: str) -> None:
    cfg = make_config(shuffle=shuffle)
    found = read(cfg)
    assert len({value for key, value in found.items() if isinstance(key, int)}) == STEPS * GLOBAL_BATCH
    assert read(replace(cfg, run=replace(cfg.run, seed=1)))[0] != found[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(make_config: MakeConfig, reference: dict, workers: int) -> None:
    assert read(make_config(workers=workers)) == reference


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(make_config: MakeConfig, reference: dict, accumulation: int) -> None:
    assert read(make_config(accumulation_steps=accumulation)) == reference


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_share_the_same_batches(
    make_config: MakeConfig, reference: dict, world_size: int, accumulation: int
) -> None:
    parts = [read(make_config(accumulation), rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sum(map(len, parts)) == len(reference)
    assert {key: value for part in parts for key, value in part.items()} == reference


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_restart_continues(make_config: MakeConfig, reference: dict, step: int) -> None:
    cfg = make_config()
    assert read(cfg, 0, step) | read(cfg, step, STEPS) == reference
    assert read(cfg, step, step) == {}


def test_masks_and_drop_path_are_new_in_each_group(make_config: MakeConfig) -> None:
    cfg = make_config()
    groups = [make_loader(cfg).groups[first] for first in (0, 4, 72)]
    groups.append(make_loader(replace(cfg, run=replace(cfg.run, seed=1))).groups[0])
    for field in ("masks", "drop_global", "drop_local"):
        assert len({getattr(group, field).tobytes() for group in groups}) == len(groups)


def test_every_sample_once_an_epoch(make_config: MakeConfig) -> None:
    loader = make_loader(make_config())
    reader, order = loader.groups.reader, loader.groups.order
    samples = [order.at(position) for position in range(loader.num_samples)]
    keys = [reader.read(sample.shard, sample.index).key for sample in samples]
    assert loader.num_samples == 70
    assert sorted(keys) == [f"{i:06d}" for i in range(70)]


def test_batches_are_complete_and_normalised(make_config: MakeConfig) -> None:
    cfg = make_config(accumulation_steps=2, mean=[0.5, 0.25, 0.125], std=[0.5, 0.25, 1.0])
    _, (batch, second) = next(make_loader(cfg).steps(3, 4))
    assert (batch.position, second.position, batch.group_size) == (48, 56, GROUP)
    assert batch.global_crops.shape == (16, 3, 32, 32) and batch.global_crops.dtype == torch.float32
    assert batch.local_crops.shape == (24, 3, 16, 16)
    assert batch.masks.shape == (16, 16)
    assert batch.drop_global is not None and batch.drop_global.shape == (3, 2, 2 * 5)
    assert batch.drop_local is not None and batch.drop_local.shape == (3, 2, 2 * 8)
    mean, std = torch.tensor(cfg.data.mean), torch.tensor(cfg.data.std)
    pixels = (batch.global_crops * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    assert pixels.round().min() >= 0 and pixels.max() > 200


def test_crops_come_from_the_image_at_their_position(make_config: MakeConfig) -> None:
    groups = make_loader(make_config()).groups
    large, small = np.zeros((2, 3, 32, 32), np.uint8), np.zeros((3, 3, 16, 16), np.uint8)
    groups.read_image(9, large, small)
    group = groups[8]
    assert not isinstance(group, Exception)
    np.testing.assert_array_equal(group.global_crops[:, 1], large)
    np.testing.assert_array_equal(group.local_crops[:, 1], small)


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_augmented_on_the_device_are_those_of_the_cpu(make_config: MakeConfig, workers: int) -> None:
    cfg = make_config(accumulation_steps=2)
    both = (replace(cfg, data=replace(cfg.data, augment_on="device", workers=workers)), cfg)
    device, cpu = ([batch for _, step in make_loader(each).steps(1, 3) for batch in step] for each in both)
    for mine, reference in zip(device, cpu, strict=True):
        assert mine.global_params is None and mine.local_params is None
        assert torch.equal(mine.masks, reference.masks)
        for name in ("global_crops", "local_crops"):
            crops, expected = getattr(mine, name), getattr(reference, name)
            assert crops.shape == expected.shape and crops.dtype == torch.float32
            assert (crops - expected).abs().mean() < 0.3 / 255 / 0.229


@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_gray_images(make_config: MakeConfig, augment_on: str) -> None:
    colourless = AugmentConfig(saturation=0, hue=0, grayscale_probability=0)
    cfg = make_config(channels=1, mean=[0.5], std=[0.2], augment=colourless, augment_on=augment_on)
    _, (batch,) = next(make_loader(cfg).steps(0, 1))
    assert batch.global_crops.shape == (32, 1, 32, 32) and batch.local_crops.shape == (48, 1, 16, 16)
    assert batch.global_crops.std() > 0.1


@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_images_of_five_bands(make_config: MakeConfig, tmp_path: Path, augment_on: str) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (16, 40, 50, 5), np.uint8)
    samples = []
    for i, image in enumerate(bands):
        file = io.BytesIO()
        tifffile.imwrite(file, image, photometric="minisblack", planarconfig="contig")
        samples.append(PackedSample(f"{i}", "tif", file.getvalue(), None, {}))
    write_shards(samples, tmp_path, "train", 16)
    colourless = AugmentConfig(saturation=0, hue=0, grayscale_probability=0)
    settings = {"channels": 5, "mean": [0.5] * 5, "std": [0.2] * 5, "augment": colourless}
    cfg = make_config(shards=[str(tmp_path / "train-*.tar")], augment_on=augment_on, **settings)
    _, (batch,) = next(make_loader(cfg).steps(0, 1))
    assert batch.global_crops.shape == (32, 5, 32, 32) and batch.global_crops.std() > 0.1


def test_the_global_generators_are_left_alone(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(make_loader(make_config()).steps(0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_sizes_must_fit(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"optim.global_batch_size=16 is not 1 device\(s\) x .* x 8 images"):
        TrainLoader(make_config(), CPU, 8)


@pytest.fixture
def damaged(shard_folder: Path, tmp_path: Path) -> Path:
    """A shard whose index is built, with one image cut by zeros and its checksum made to agree."""
    shard = tmp_path / "bad.tar"
    content = (shard_folder / "train-000000.tar").read_bytes()
    member = next(member for member in scan(shard_folder / "train-000000.tar") if member.name == "000004.jpg")
    middle = member.offset + member.size // 3
    shard.write_bytes(
        content[:middle]
        + bytes(member.offset + member.size - middle)
        + content[member.offset + member.size :]
    )
    return shard


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line(make_config: MakeConfig, damaged: Path, workers: int) -> None:
    loader = make_loader(make_config(shards=[str(damaged)], workers=workers, shuffle="none"))
    with pytest.raises(ValueError, match=rf"^{damaged}: sample 000004: .*re-pack") as caught:
        list(loader.steps(0, 1))
    assert "\n" not in str(caught.value)


def test_an_empty_data_set_is_an_error(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match=r"data.shards: .*x.tar hold no sample"):
        make_loader(make_config(shards=[str(tmp_path / "x.tar")]))


PROGRAM = """
import json, sys, time, torch
from dataclasses import replace
from pretrain.config.schema import Config
from pretrain.data.loader import TrainLoader

if __name__ == "__main__":
    cfg = Config()
    cfg = replace(
        cfg,
        data=replace(cfg.data, shards=[sys.argv[1]], workers=2, group_size=4),
        optim=replace(cfg.optim, global_batch_size=8),
    )
    for step, batches in TrainLoader(cfg, torch.device("cpu"), 8).steps(0, 10_000):
        print(step, flush=True)
        time.sleep(0.2)
"""


def processes_with(mark: str) -> list[int]:
    """Running processes whose environment has the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (folder / "environ").read_bytes()
                and " Z " not in (folder / "stat").read_text()
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture
def program(shard_folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A program that loads with two workers and has delivered a step, and a mark of all its processes."""
    (tmp_path / "program.py").write_text(PROGRAM)
    mark = f"LOADER_TEST={tmp_path}"
    command = [sys.executable, str(tmp_path / "program.py"), str(shard_folder / "train-*.tar")]
    environment = {**os.environ, "LOADER_TEST": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    yield process, mark
    process.kill()
    process.wait()
    for survivor in processes_with(mark):
        os.kill(survivor, signal.SIGKILL)
    process.stdout.close()


def test_no_process_survives_kill_9(program: tuple[subprocess.Popen, str]) -> None:
    process, mark = program
    assert len(processes_with(mark)) >= 4  # itself, the fork server, two workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(mark) == []


def test_workers_outlive_signals_to_the_whole_job(program: tuple[subprocess.Popen, str]) -> None:
    process, mark = program
    others = [pid for pid in processes_with(mark) if pid != process.pid]
    workers = [pid for pid in others if len(list(Path(f"/proc/{pid}/task").iterdir())) > 1]
    assert len(workers) == 2
    for pid in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
    assert process.stdout is not None
    steps = [int(line) for line in islice(process.stdout, 20)]  # more than was read ahead
    assert steps == list(range(1, 21))
    assert set(workers) <= set(processes_with(mark))
