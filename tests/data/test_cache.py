import hashlib
import io
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pretrain.config.schema import CacheConfig, DataConfig
from pretrain.data.cache import ShardCache
from pretrain.data.download import indexed_bytes
from pretrain.data.file_lock import FileLock
from pretrain.data.index import build_index, index_path
from pretrain.data.remote import cache_name
from pretrain.data.room import lock_path, work_path
from pretrain.errors import InputError, TrainingError
from pretrain.processes import children
from tests.data.http_server import FileServer, serving
from tests.data.pictures import encode

PICTURE = encode(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
ROOT = Path(__file__).parents[2]
LONG_AGO = 10**18  # nanoseconds: in 2001


def tar_bytes(number: int) -> bytes:
    """A shard of three images and a long note; another one for each number."""
    members = {f"{number}-{i}.jpg": PICTURE for i in range(3)} | {f"{number}-0.json": b"[0]" + b" " * 40_000}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


SHARDS = {f"x-{i}.tar": tar_bytes(i) for i in range(8)}
SIZE = len(SHARDS["x-0.tar"])


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


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No child, and in the cache nothing but shards and indexes."""
    before = set(children(os.getpid()))
    yield
    assert set(children(os.getpid())) <= before
    names = [path.name for path in (tmp_path / "cache").glob("*")] + [
        path.name for path in (tmp_path / "cache").glob(".*")
    ]
    assert [name for name in names if not re.fullmatch(r"[^.].*\.[0-9a-f]{16}\.tar(\.idx)?", name)] == []


def shards_in(folder: Path) -> set[str]:
    """The base names of the copies."""
    return {path.name.split(".")[0] for path in folder.glob("*.tar")}


def make_unused(path: Path, rank: int) -> None:
    """As if a copy had been asked for last in 2001, later for a higher rank."""
    os.utime(path, ns=(LONG_AGO + rank, path.stat().st_mtime_ns))


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


def test_a_damaged_sample_is_named_with_the_address(
    server: FileServer, make_cache: Callable[..., ShardCache]
) -> None:
    server.files["x-0.tar"] = SHARDS["x-0.tar"].replace(PICTURE, bytes(len(PICTURE)))
    with pytest.raises(InputError, match=rf"^{server.url('x-0.tar')}: .*not an image"):
        make_cache().index_of(server.url("x-0.tar"))


def test_many_indexes_at_once(make_cache: Callable[..., ShardCache]) -> None:
    for name, content in SHARDS.items():
        fsspec.filesystem("memory").pipe(f"/bucket/{name}", content)
    cache = make_cache()
    found = cache.indexes_of([f"memory://bucket/{name}" for name in SHARDS])
    assert [indexed_bytes(path) for path in found] == [SIZE] * 8
    with pytest.raises(InputError, match=r"^memory://bucket/nothing.tar: "):
        cache.indexes_of(["memory://bucket/nothing.tar", "memory://bucket/x-0.tar"])


FETCH_ALL = """
import hashlib, os, sys
from pathlib import Path
from pretrain.data.cache import ShardCache
processes, ample, tight, limit, *urls = sys.argv[1:]
for number in range(1, int(processes)):
    if not os.fork():
        break
else:
    number = 0
for folder, limit in ((ample, 10**9), (tight, int(limit))):
    cache = ShardCache(Path(folder), limit, attempts=3, seconds=30)
    for url in urls:
        content = b""
        while not content:
            try:
                content = cache.fetch(url).read_bytes()
            except FileNotFoundError:  # evicted in between
                continue
        os.write(1, f"{number} {hashlib.sha256(content).hexdigest()}\\n".encode())
"""


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.dist
def test_processes_share_a_cache(
    server: FileServer, make_cache: Callable[..., ShardCache], tmp_path: Path
) -> None:
    """In one that holds all shards, each is downloaded once; one for three shards stays within its limit."""
    tight, ample, limit, processes = make_cache().folder, tmp_path / "ample", 3 * SIZE, 3
    urls = [server.url(name) for name in SHARDS]
    output, errors = run(FETCH_ALL, processes, ample, tight, limit, *urls).communicate(timeout=60)
    lines = [line.split() for line in output.splitlines()]
    expected = [hashlib.sha256(content).hexdigest() for content in SHARDS.values()]
    for i in range(processes):
        assert [digest for number, digest in lines if number == str(i)] == expected * 2
    assert errors == ""
    assert all(2 <= server.requests["GET", name] <= 1 + processes for name in SHARDS)
    assert sum(path.stat().st_size for path in tight.glob("*.tar")) <= limit
    assert sorted(path.name for path in ample.iterdir()) == sorted(cache_name(url) for url in urls)


@pytest.mark.dist
def test_a_killed_download_leaves_nothing_that_blocks(
    server: FileServer, make_cache: Callable[..., ShardCache]
) -> None:
    server.faults["GET", "x-0.tar"] = ["stall"]
    cache, urls = make_cache(max_bytes=SIZE), [server.url("x-0.tar"), server.url("x-1.tar")]
    process = run(FETCH_ALL, 1, cache.folder, cache.folder, SIZE, urls[0])
    while not server.requests["GET", "x-0.tar"]:
        assert process.poll() is None
        time.sleep(0.02)
    assert list(cache.folder.glob(".*.part")) and list(cache.folder.glob(".*.lock"))
    process.send_signal(signal.SIGKILL)
    for pipe in (
        process.stdout,
        process.stderr,
    ):  # its curl holds them too, as long as the server does not speak
        assert pipe is not None
        pipe.close()
    # Not waited for: a process that ended but is still in the table counts as dead.
    assert cache.fetch(urls[1]).read_bytes() == SHARDS["x-1.tar"]  # the room of the dead one is free again
    assert not list(cache.folder.glob(".*"))
    make_unused(cache.fetch(urls[1]), 0)
    assert cache.fetch(urls[0]).read_bytes() == SHARDS["x-0.tar"]
    process.wait()


def test_a_silent_owner_loses_its_lock(tmp_path: Path) -> None:
    """One of another machine, or one that is suspended."""
    path = tmp_path / "lock"
    path.write_text('{"host": "elsewhere", "pid": 1, "started": "1"}')
    lock = FileLock(path, stale_seconds=0.3)
    assert not lock.acquire()
    os.utime(path)
    time.sleep(0.2)
    assert not lock.acquire()  # it was touched meanwhile
    time.sleep(0.4)
    assert lock.acquire()
    assert not FileLock(path).acquire()
    lock.release()
    assert not path.exists()


def test_a_lock_in_other_hands_is_left_there(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    lock.path.write_text('{"host": "elsewhere"}')
    lock.release()
    assert lock.path.exists()


def test_left_overs_without_a_lock_are_removed(
    server: FileServer, make_cache: Callable[..., ShardCache]
) -> None:
    cache = make_cache()
    name = cache.folder / cache_name(server.url("x-7.tar"))
    left = [
        work_path(name),
        work_path(index_path(name)),
        name.with_name(f".{name.name}.idx.some.host.12.tmp"),
    ]
    for path in [*left, lock_path(name).with_name(f"{lock_path(name).name}.0123abcd")]:
        path.write_bytes(bytes(10))
    cache.fetch(server.url("x-0.tar"))
    assert [path.name for path in cache.folder.iterdir()] == [cache_name(server.url("x-0.tar"))]


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


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
