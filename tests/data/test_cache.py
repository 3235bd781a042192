"""One process and its cache, against a real server that has faults."""

import os
import pickle
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from pretrain.config.schema import CacheConfig, DataConfig
from pretrain.data.cache import ShardCache
from pretrain.data.download import indexed_bytes
from pretrain.data.index import index_path
from pretrain.data.indexing import build_index
from pretrain.errors import InputError, TrainingError
from tests.data.http_server import FileServer
from tests.data.remote_shards import SHARDS, SIZE, make_unused, shards_in, tar_bytes, write

pytestmark = pytest.mark.usefixtures("tidy_cache")


def test_a_shard_is_downloaded_once(server: FileServer, make_cache: Callable[..., ShardCache]) -> None:
    cache = pickle.loads(pickle.dumps(make_cache()))
    url = server.url("x-0.tar")
    first = cache.fetch(url)
    assert first.read_bytes() == SHARDS["x-0.tar"]
    assert (cache.fetch(url), make_cache().fetch(url)) == (first, first)
    assert server.requests["GET", "x-0.tar"] == 1


def test_equal_base_names_are_kept_apart(server: FileServer, make_cache: Callable[..., ShardCache]) -> None:
    server.files |= {"a/x.tar": SHARDS["x-0.tar"], "b/x.tar": SHARDS["x-1.tar"]}
    cache = make_cache()
    paths = [cache.fetch(server.url(f"{folder}/x.tar")) for folder in "ab"]
    assert [path.read_bytes() for path in paths] == [SHARDS["x-0.tar"], SHARDS["x-1.tar"]]


@pytest.mark.parametrize("faults", [["cut"], ["short", "long"], ["500"], ["unknown"]])
def test_passing_faults_are_outlived(
    server: FileServer,
    make_cache: Callable[..., ShardCache],
    faults: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    method = "HEAD" if "500" in faults else "GET"
    server.faults[method, "x-0.tar"] = list(faults)
    assert make_cache().fetch(server.url("x-0.tar")).read_bytes() == SHARDS["x-0.tar"]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == (0 if faults == ["unknown"] else len(faults))
    assert all(line.startswith(f"{server.url('x-0.tar')}: ") for line in lines)


def test_a_stall_is_ended_and_tried_again(
    server: FileServer, make_cache: Callable[..., ShardCache], capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults["GET", "x-0.tar"] = ["stall"]
    assert make_cache(seconds=1.0).fetch(server.url("x-0.tar")).read_bytes() == SHARDS["x-0.tar"]
    assert "x-0.tar: no byte for 1 s; attempt 2 of 3" in capfd.readouterr().err


def test_a_fault_that_stays_is_one_line(server: FileServer, make_cache: Callable[..., ShardCache]) -> None:
    server.faults["GET", "x-0.tar"] = ["cut"] * 9
    with pytest.raises(
        TrainingError, match=r"x-0\.tar: gave up after 3 attempts: the connection closed before"
    ):
        make_cache().fetch(server.url("x-0.tar"))
    assert server.requests["GET", "x-0.tar"] == 3


@pytest.mark.parametrize("status", ["404", "403"])
def test_a_shard_that_does_not_exist_is_asked_for_once(
    server: FileServer, make_cache: Callable[..., ShardCache], status: str
) -> None:
    server.faults = {(method, "x-0.tar"): [status] * 9 for method in ("GET", "HEAD")}
    with pytest.raises(InputError, match=rf"^{server.url('x-0.tar')}: HTTP status {status}"):
        make_cache().fetch(server.url("x-0.tar"))
    assert server.requests["GET", "x-0.tar"] <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>please log in</html>" * 100, "all 2,600 bytes came, but is not an uncompressed tar file"),
        (SHARDS["x-0.tar"][: SIZE // 2], "all .* bytes came, but byte .*cut short"),
        (b"", "is empty or cut short"),
    ],
)
def test_a_wrong_file_at_the_origin(
    server: FileServer, make_cache: Callable[..., ShardCache], content: bytes, message: str
) -> None:
    server.files["x-0.tar"] = content
    with pytest.raises((InputError, TrainingError), match=rf"^{server.url('x-0.tar')}: .*{message}"):
        make_cache().fetch(server.url("x-0.tar"))
    assert shards_in(make_cache().folder) == set()


def test_commands(tmp_path: Path, make_cache: Callable[..., ShardCache]) -> None:
    (tmp_path / "x.tar").write_bytes(SHARDS["x-0.tar"])
    cache = make_cache(max_bytes=SIZE)
    assert cache.fetch(f"pipe:cat {tmp_path}/x.tar").read_bytes() == SHARDS["x-0.tar"]
    with pytest.raises(
        TrainingError, match=r"gave up after 3 attempts: its command failed \(exit status 1\)$"
    ):
        cache.fetch(f"pipe:cat {tmp_path}/y.tar")
    with pytest.raises(TrainingError, match=r"gave up after 3 attempts: got 20,000 bytes .*cut short"):
        cache.fetch(f"pipe:cat {tmp_path}/x.tar | head -c 20000")  # the failure of `cat` is lost in the shell
    with pytest.raises(InputError, match=r"data\.cache\.max_gb: .* bytes or more, and the cache may hold"):
        cache.fetch(f"pipe:cat {tmp_path}/x.tar {tmp_path}/x.tar")


def test_what_was_used_longest_ago_makes_room(
    server: FileServer, make_cache: Callable[..., ShardCache]
) -> None:
    cache = make_cache(max_bytes=3 * SIZE + 100)
    other = cache.folder / "mine.tar"
    other.write_bytes(bytes(5 * SIZE))
    for rank, i in enumerate([2, 0, 1]):
        make_unused(cache.fetch(server.url(f"x-{i}.tar")), rank)
    cache.fetch(server.url("x-2.tar"))  # used again
    cache.fetch(server.url("x-3.tar"))
    assert shards_in(cache.folder) == {"x-1", "x-2", "x-3", "mine"}
    assert server.requests["GET", "x-2.tar"] == 1
    other.unlink()


def test_an_evicted_shard_that_is_open_can_be_read_on(
    server: FileServer, make_cache: Callable[..., ShardCache]
) -> None:
    cache = make_cache(max_bytes=SIZE)
    path = cache.fetch(server.url("x-0.tar"))
    with path.open("rb") as file:
        make_unused(path, 0)
        cache.fetch(server.url("x-1.tar"))
        assert not path.exists()
        assert file.read() == SHARDS["x-0.tar"]
    assert cache.fetch(server.url("x-0.tar")).exists()


def test_a_shard_larger_than_the_cache(server: FileServer, make_cache: Callable[..., ShardCache]) -> None:
    with pytest.raises(
        InputError, match=rf"x-0.tar has {SIZE:,} bytes or more, and the cache may hold {SIZE - 1:,}"
    ):
        make_cache(max_bytes=SIZE - 1).fetch(server.url("x-0.tar"))
    assert server.requests["GET", "x-0.tar"] == 0


def test_the_index_beside_a_shard_is_used(
    server: FileServer, make_cache: Callable[..., ShardCache], tmp_path: Path
) -> None:
    build_index(shard := write(tmp_path / "x-0.tar", SHARDS["x-0.tar"]))
    server.files["x-0.tar.idx"] = index_path(shard).read_bytes()
    cache, url = make_cache(), server.url("x-0.tar?version=2")
    index = cache.index_of(url)
    assert index.read_bytes() == index_path(shard).read_bytes()
    assert cache.index_of(url) == index == index_path(cache.fetch(url))
    assert (server.requests["GET", "x-0.tar.idx"], server.requests["GET", "x-0.tar"]) == (1, 1)


@pytest.mark.parametrize("beside", [None, b"", b"<html>", b"PTINDEX1" + bytes(100)])
def test_an_index_that_is_missing_or_damaged_is_built(
    server: FileServer, make_cache: Callable[..., ShardCache], beside: bytes | None
) -> None:
    if beside is not None:
        server.files["x-0.tar.idx"] = beside
    cache = make_cache()
    index = cache.index_of(server.url("x-0.tar"))
    assert indexed_bytes(index) == SIZE
    assert cache.fetch(server.url("x-0.tar")).stat().st_mtime_ns <= index.stat().st_mtime_ns
    assert server.requests["GET", "x-0.tar"] == 1


def test_the_index_of_another_shard_is_refused(
    server: FileServer, make_cache: Callable[..., ShardCache], tmp_path: Path
) -> None:
    server.files["x-0.tar"] += bytes(512)
    build_index(shard := write(tmp_path / "x-0.tar", SHARDS["x-0.tar"]))
    server.files["x-0.tar.idx"] = index_path(shard).read_bytes()
    cache = make_cache()
    cache.index_of(server.url("x-0.tar"))
    with pytest.raises(
        InputError, match=rf"has {SIZE + 512:,} bytes, but its index is of a file of {SIZE:,}; write"
    ):
        cache.fetch(server.url("x-0.tar"))


def test_a_copy_that_was_cut_by_a_crash_is_replaced(
    server: FileServer, make_cache: Callable[..., ShardCache]
) -> None:
    cache, url = make_cache(), server.url("x-0.tar")
    cache.index_of(url)
    os.truncate(cache.fetch(url), 0)
    assert cache.fetch(url).read_bytes() == SHARDS["x-0.tar"]


def test_an_unclear_shard_is_named_with_the_address(
    server: FileServer, make_cache: Callable[..., ShardCache]
) -> None:
    server.files["x-0.tar"] = tar_bytes(0, twice=True)
    with pytest.raises(InputError, match=rf"^{server.url('x-0.tar')}: .*0-0.jpg is in the shard twice"):
        make_cache().index_of(server.url("x-0.tar"))


def test_many_indexes_at_once(make_cache: Callable[..., ShardCache]) -> None:
    for name, content in SHARDS.items():
        fsspec.filesystem("memory").pipe(f"/bucket/{name}", content)
    cache = make_cache()
    found = cache.indexes_of([f"memory://bucket/{name}" for name in SHARDS])
    assert [indexed_bytes(path) for path in found] == [SIZE] * 8
    with pytest.raises(InputError, match=r"^memory://bucket/nothing.tar: "):
        cache.indexes_of(["memory://bucket/nothing.tar", "memory://bucket/x-0.tar"])


@pytest.fixture
def small_files() -> Iterator[None]:
    """Stands for a full disk: no file may be larger than half a shard."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk(server: FileServer, make_cache: Callable[..., ShardCache]) -> None:
    cache = make_cache()
    make_unused(cache.fetch(server.url("x-1.tar")), 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    message = (
        rf"^{cache.folder}: no room for \S*x-0.tar of {SIZE:,} bytes \(File too large\); free some, lower"
    )
    with pytest.raises(TrainingError, match=message):
        cache.fetch(server.url("x-0.tar"))
    assert shards_in(cache.folder) == set()  # an old copy was given up for it


def test_a_folder_that_cannot_be_written(tmp_path: Path, server: FileServer) -> None:
    file = write(tmp_path / "file", b"")
    for folder in (file, file / "cache"):
        with pytest.raises(
            InputError, match=rf"^data\.cache\.dir: {folder}: .*; name a folder that can be written$"
        ):
            ShardCache(folder, 10**9, 3, 10.0)
    cache = ShardCache(tmp_path / "gone", 10**9, 3, 10.0)
    cache.folder.rmdir()
    with pytest.raises(InputError, match=rf"^data\.cache\.dir: {cache.folder}: No such file or directory$"):
        cache.fetch(server.url("x-0.tar"))


def test_the_cache_of_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = DataConfig(cache=CacheConfig(dir="~/copies", max_gb=0.5), io_attempts=2, io_timeout=3.0)
    cache = ShardCache.from_config(data)
    assert (cache.folder, cache.attempts) == (tmp_path / "copies", 2)
    assert (cache._downloader.room.max_bytes, cache._downloader.seconds) == (500_000_000, 3.0)


def test_a_user_without_a_home(tmp_path: Path) -> None:
    data = DataConfig(cache=CacheConfig(dir="~nobody-of-this-name/shards"))
    with pytest.raises(InputError, match=r"^data.cache.dir: ~nobody.* name a folder without ~$"):
        ShardCache.from_config(data)
