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

from pretrain.batch import Batch, normalize_pixels
from pretrain.config.schema import AugmentConfig, Config, SourceConfig
from pretrain.data.group import GroupMaker, GroupReport
from pretrain.data.loader import TrainLoader
from pretrain.data.slots import GroupArrays, SlotLayout
from pretrain.data.writer import PackedSample, write_shards
from tests.data.conftest import GLOBAL_BATCH, GROUP, config_maker

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


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_three_epochs_are_the_same_for_ranks_and_workers(
    make_config: MakeConfig, three_epochs: dict, workers: int, world_size: int
) -> None:
    cfg = make_config(workers=workers)
    parts = [read(cfg, 0, 14, rank, world_size) for rank in range(world_size)]
    assert {key: value for part in parts for key, value in part.items()} == three_epochs


@pytest.fixture(scope="module")
def three_epochs(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """224 positions of 70 samples."""
    return read(config_maker(shard_folder, tmp_path_factory.mktemp("run"))(), 0, 14)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_restart_continues(make_config: MakeConfig, reference: dict, step: int) -> None:
    cfg = make_config()
    assert read(cfg, 0, step) | read(cfg, step, STEPS) == reference
    assert read(cfg, step, step) == {}


def make_group(cfg: Config, first: int) -> GroupArrays:
    out = SlotLayout(cfg, GROUP).allocate().group(0)
    report = GroupMaker(cfg).make(first, out)
    assert report.images == GROUP and set(report.seconds) == {"read", "decode", "augment"}
    return out


def test_another_batch_size_goes_on_at_the_same_position(make_config: MakeConfig, reference: dict) -> None:
    cfg = make_config()
    state = make_loader(cfg).state_dict(3)
    assert (state["position"], state["num_samples"], state["sources"]) == (
        48,
        70,
        [{"samples": 70, "epoch": 0}],
    )
    halved = replace(cfg, optim=replace(cfg.optim, global_batch_size=8))
    loader = TrainLoader(halved, CPU, 8)
    loader.load_state_dict(state, 3)
    found = [dict(images_of(batch)) for _, batches in loader.steps(3, 5) for batch in batches]
    assert found == [{i: reference[i] for i in range(48, 56)}, {i: reference[i] for i in range(56, 64)}]
    assert loader.state_dict(5)["position"] == 64


def test_two_sources_keep_their_ratio(make_config: MakeConfig, shard_folder: Path) -> None:
    first, second = (str(shard_folder / f"train-{name}.tar") for name in ("00000[01]", "00000[2-4]"))
    sources = [SourceConfig([first], 0.7), SourceConfig([second], 0.3)]
    maker = GroupMaker(make_config(shards=[], sources=sources))
    places = [maker.order.at(position) for position in range(2_000)]
    assert [place.source for place in places[:1_000]].count(0) == 700
    keys = [maker.reader.read(place.shard, place.index).key for place in places]
    for source, size in ((0, 30), (1, 40)):
        mine = [(place.epoch, key) for place, key in zip(places, keys, strict=True) if place.source == source]
        assert sorted(mine[:size]) == [(0, f"{i:06d}") for i in range(30 * source, 30 * source + size)]
        assert {epoch for epoch, _ in mine[size : 2 * size]} == {1}


def test_masks_and_drop_path_are_new_in_each_group(make_config: MakeConfig) -> None:
    cfg = make_config()
    groups = [make_group(cfg, first) for first in (0, 4, 72)]
    groups.append(make_group(replace(cfg, run=replace(cfg.run, seed=1)), 0))
    for field in ("masks", "drop_global", "drop_local"):
        assert len({getattr(group, field).tobytes() for group in groups}) == len(groups)


def test_every_sample_once_an_epoch(make_config: MakeConfig) -> None:
    loader = make_loader(make_config())
    reader, order = loader.maker.reader, loader.maker.order
    samples = [order.at(position) for position in range(loader.num_samples)]
    keys = [reader.read(sample.shard, sample.index).key for sample in samples]
    assert loader.num_samples == 70
    assert sorted(keys) == [f"{i:06d}" for i in range(70)]


def test_batches_are_complete(make_config: MakeConfig) -> None:
    cfg = make_config(accumulation_steps=2)
    _, (batch, second) = next(make_loader(cfg).steps(3, 4))
    assert (batch.position, second.position, batch.group_size) == (48, 56, GROUP)
    assert batch.global_crops.shape == (16, 3, 32, 32) and batch.global_crops.dtype == torch.uint8
    assert batch.local_crops.shape == (24, 3, 16, 16)
    assert batch.masks.shape == (16, 16)
    assert batch.drop_global is not None and batch.drop_global.shape == (3, 2, 2 * 5)
    assert batch.drop_local is not None and batch.drop_local.shape == (3, 2, 2 * 8)
    assert batch.global_crops.max() > 200


def test_pixels_are_normalised_per_channel() -> None:
    pixels = torch.tensor([[[[0]], [[255]], [[51]]]], dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([0.5, 0.25, 1.0])
    expected = torch.tensor([-1.0, 3.0, 0.075]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize_pixels(pixels, mean, std), expected)


def test_crops_come_from_the_image_at_their_position(make_config: MakeConfig) -> None:
    cfg = make_config()
    large, small = np.zeros((2, 3, 32, 32), np.uint8), np.zeros((3, 3, 16, 16), np.uint8)
    image = GroupArrays(large[:, None], small[:, None], *[None] * 5)
    GroupMaker(cfg).make_image(9, image, 0, GroupReport())
    group = make_group(cfg, 8)
    np.testing.assert_array_equal(group.global_crops[:, 1], large)
    np.testing.assert_array_equal(group.local_crops[:, 1], small)


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_augmented_on_the_device_are_those_of_the_cpu(make_config: MakeConfig, workers: int) -> None:
    cfg = make_config(accumulation_steps=2)
    both = (replace(cfg, data=replace(cfg.data, augment_on="device", workers=workers)), cfg)
    device, cpu = (
        [batch.clone() for _, step in make_loader(each).steps(1, 3) for batch in step] for each in both
    )
    for mine, reference in zip(device, cpu, strict=True):
        assert torch.equal(mine.masks, reference.masks)
        for name in ("global_crops", "local_crops"):
            crops, expected = getattr(mine, name), getattr(reference, name)
            assert crops.shape == expected.shape and crops.dtype == torch.uint8
            assert (crops.float() - expected.float()).abs().mean() < 0.01


@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_gray_images(make_config: MakeConfig, augment_on: str) -> None:
    colourless = AugmentConfig(saturation=0, hue=0, grayscale_probability=0)
    cfg = make_config(channels=1, mean=[0.5], std=[0.2], augment=colourless, augment_on=augment_on)
    _, (batch,) = next(make_loader(cfg).steps(0, 1))
    assert batch.global_crops.shape == (32, 1, 32, 32) and batch.local_crops.shape == (48, 1, 16, 16)
    assert batch.global_crops.float().std() > 20


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
    assert batch.global_crops.shape == (32, 5, 32, 32) and batch.global_crops.float().std() > 20


def test_the_global_generators_are_left_alone(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(make_loader(make_config()).steps(0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_sizes_must_fit(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"optim.global_batch_size=16 is not 1 device\(s\) x .* x 8 images"):
        TrainLoader(make_config(), CPU, 8)


def test_an_empty_data_set_is_an_error(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match=r"data.shards: .*x.tar hold no sample"):
        make_loader(make_config(shards=[str(tmp_path / "x.tar")]))


PROGRAM = """
import json, sys, time, torch
from dataclasses import replace
from pretrain.config.schema import AugmentConfig, Config, SourceConfig
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
    files = [path.resolve() for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    named = [path for path in files if path.is_relative_to("/dev/shm")]
    assert named == []  # the slots have no name: they go with the last process
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
