"""Several processes and one cache; what dead processes leave behind."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data.cache import ShardCache
from pretrain.data.file_lock import FileLock
from pretrain.data.index import index_path
from pretrain.data.remote import cache_name
from pretrain.data.room import lock_path, work_path
from tests.data.http_server import FileServer
from tests.data.remote_shards import SHARDS, SIZE, make_unused

pytestmark = pytest.mark.usefixtures("tidy_cache")

ROOT = Path(__file__).parents[2]

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
