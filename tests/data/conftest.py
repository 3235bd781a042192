import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from pretrain.config.schema import Config, CropConfig, LocalCropConfig
from pretrain.data.cache import ShardCache
from pretrain.data.writer import PackedSample, write_shards
from pretrain.processes import children
from tests.data.http_server import FileServer, serving
from tests.data.pictures import encode
from tests.data.remote_shards import SHARDS, SIZE

GROUP, GLOBAL_BATCH = 4, 16


@pytest.fixture(scope="session")
def images() -> dict[str, np.ndarray]:
    """Two photos of 375 x 500 pixels, and noise."""
    china, flower = (np.ascontiguousarray(photo[20:395, 60:560]) for photo in load_sample_images().images)
    noise = np.random.default_rng(0).integers(0, 256, china.shape, dtype=np.uint8)
    return {"china": china, "flower": flower, "noise": noise}


@pytest.fixture(scope="session")
def shard_folder(images: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 different labelled JPEGs in 5 shards of 15 (the last: 10), keys 000000 to 000069."""
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for i in range(70):
        picture = images["china" if i % 2 else "flower"][i : i + 90, 2 * i : 2 * i + 120]
        samples.append(PackedSample(f"{i:06d}", "jpg", encode(picture), i % 7, {"number": i}))
    write_shards(samples, folder, "train", 15)
    return folder


@pytest.fixture
def make_config(shard_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """A small configuration over `shard_folder`; keywords change its `data` and `engine` sections."""
    return config_maker(shard_folder, tmp_path / "run")


def config_maker(shard_folder: Path, run_folder: Path) -> Callable[..., Config]:
    def make(accumulation_steps: int = 1, run_dir: str = str(run_folder), **data: object) -> Config:
        cfg = Config()
        settings = {
            "shards": [str(shard_folder / "train-*.tar")],
            "group_size": GROUP,
            "workers": 0,
            "open_shards": 2,
            "global_crops": CropConfig(size=32),
            "local_crops": LocalCropConfig(size=16, number=3),
        }
        model = replace(
            cfg.model, arch="custom", embed_dim=8, depth=3, num_heads=1, patch_size=8, img_size=32
        )
        return replace(
            cfg,
            run=replace(cfg.run, dir=run_dir),
            model=model,
            data=replace(cfg.data, **{**settings, **data}),
            optim=replace(cfg.optim, global_batch_size=GLOBAL_BATCH),
            engine=replace(cfg.engine, accumulation_steps=accumulation_steps),
        )

    return make


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as server:
        server.files |= SHARDS
        yield server


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., ShardCache]:
    def make(max_bytes: int = 100 * SIZE, attempts: int = 3, seconds: float = 10.0) -> ShardCache:
        return ShardCache(tmp_path / "cache", max_bytes, attempts, seconds, first_delay=0.01)

    return make


@pytest.fixture
def tidy_cache(tmp_path: Path) -> Iterator[None]:
    """No child, and in the cache nothing but shards and indexes."""
    before = set(children(os.getpid()))
    yield
    assert set(children(os.getpid())) <= before
    names = [path.name for path in (tmp_path / "cache").glob("*")]
    assert [name for name in names if not re.fullmatch(r"[^.].*\.[0-9a-f]{16}\.tar(\.idx)?", name)] == []
