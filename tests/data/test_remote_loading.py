"""Training data behind a real HTTP server: the same crops as from local shards, whatever the server does."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pretrain.config.schema import CacheConfig, Config
from pretrain.data.loader import TrainLoader
from pretrain.errors import InputError, TrainingError
from tests.data.conftest import GLOBAL_BATCH
from tests.data.http_server import FileServer, serving

MakeConfig = Callable[..., Config]


@pytest.fixture
def server(shard_folder: Path) -> Iterator[FileServer]:
    with serving() as server:
        server.files = {path.name: path.read_bytes() for path in shard_folder.glob("train-*.tar")}
        yield server


@pytest.fixture
def remote(make_config: MakeConfig, server: FileServer, tmp_path: Path) -> MakeConfig:
    """Configurations whose shards are those of the server, with short patience."""
    defaults = {
        "shards": [server.url("train-{000000..000004}.tar")],
        "cache": CacheConfig(str(tmp_path / "cache")),
        "io_attempts": 2,
        "io_timeout": 5.0,
        "open_shards": 1,
    }
    return lambda **data: make_config(**{**defaults, **data})


def loader_of(cfg: Config) -> TrainLoader:
    return TrainLoader(cfg, torch.device("cpu"), GLOBAL_BATCH)


def hashes(loader: TrainLoader, steps: int) -> Iterator[str]:
    for _, (batch,) in loader.steps(0, steps):
        yield hashlib.sha256(batch.global_crops.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_crops_are_those_of_local_shards(
    make_config: MakeConfig, remote: MakeConfig, server: FileServer, workers: int
) -> None:
    expected = list(hashes(loader_of(make_config(open_shards=1)), 6))
    assert list(hashes(loader_of(remote(workers=workers)), 6)) == expected
    assert {name: count for (method, name), count in server.requests.items() if method == "GET"} == {
        **{f"train-{i:06d}.tar": 1 for i in range(5)},
        **{f"train-{i:06d}.tar.idx": 1 for i in range(5)},
    }


def test_a_cache_for_two_shards_is_enough(
    make_config: MakeConfig, remote: MakeConfig, server: FileServer, tmp_path: Path
) -> None:
    largest = max(len(content) for content in server.files.values())
    expected = list(hashes(loader_of(make_config(open_shards=1)), 10))
    cache = CacheConfig(str(tmp_path / "cache"), max_gb=2.5 * largest / 1e9)
    assert list(hashes(loader_of(remote(cache=cache)), 10)) == expected
    kept = list((tmp_path / "cache").glob("*.tar"))
    assert sum(path.stat().st_size for path in kept) <= 2.5 * largest


def test_the_next_shards_are_fetched_ahead(remote: MakeConfig, server: FileServer, tmp_path: Path) -> None:
    loader = loader_of(remote(shuffle="none", io_attempts=1))
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    server.requests.clear()
    steps = loader.steps(0, 4)
    next(steps)  # positions 0 to 15: the first shard and one sample of the second
    names = {name for (method, name) in server.requests if method == "GET"}
    assert {"train-000000.tar", "train-000001.tar"} <= names
    steps.close()


def test_a_server_that_comes_back_is_waited_for(
    make_config: MakeConfig, remote: MakeConfig, server: FileServer, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = list(hashes(loader_of(make_config(open_shards=1)), 2))
    loader = loader_of(remote(io_attempts=3))
    for path in Path(loader.cfg.data.cache.dir).glob("*.tar"):
        path.unlink()
    server.faults = {("HEAD", name): ["500"] for name in server.files}
    assert list(hashes(loader, 2)) == expected
    assert "attempt 2 of 3" in capfd.readouterr().err


def test_an_unreadable_address_is_one_line(remote: MakeConfig, server: FileServer) -> None:
    with pytest.raises(InputError, match=r"^http://127.0.0.1:\d+/nothing.tar: .*404") as caught:
        loader_of(remote(shards=[server.url("nothing.tar")]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_stays_away_ends_the_run(remote: MakeConfig, server: FileServer, workers: int) -> None:
    loader = loader_of(remote(workers=workers))
    for path in Path(loader.cfg.data.cache.dir).glob("*.tar"):
        path.unlink()
    server.faults = {("HEAD", name): ["500"] * 100 for name in server.files}
    with pytest.raises(TrainingError, match=r"train-00000\d.tar: gave up after 2 attempts"):
        list(loader.steps(0, 6))
