import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pretrain.data.remote import cache_name, is_remote, local_path, shown
from pretrain.data.transfer import read_remote, remote_size
from pretrain.errors import InputError
from pretrain.processes import children
from tests.data.http_server import FileServer, serving

CONTENT = bytes(range(256)) * 2000
SECONDS, SHORT = 10.0, 1.0  # without a byte; the short one where that is to happen


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as server:
        server.files["x.tar"] = CONTENT
        yield server


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    before = set(children(os.getpid()))
    yield
    assert set(children(os.getpid())) <= before


def read(url: str, seconds: float = SECONDS) -> bytes:
    return b"".join(read_remote(url, seconds))


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        *(
            (f"{scheme}://h/x.tar", True)
            for scheme in ("http", "https", "s3", "gs", "hf", "ais", "HTTPS", "a+b-c.d")
        ),
        ("pipe:cat x.tar", True),
        *(
            (name, False)
            for name in ("x.tar", "/d/x.tar", "./a:b.tar", "file:/d/x.tar", "file:///d/x.tar", "d//x")
        ),
    ],
)
def test_which_names_are_remote(name: str, remote: bool) -> None:
    assert is_remote(name) is remote


def test_local_files_may_be_written_as_addresses() -> None:
    assert {local_path(name) for name in ("/d/x y.tar", "file:/d/x y.tar", "file:///d/x%20y.tar")} == {
        "/d/x y.tar"
    }


def test_messages_hold_no_secrets() -> None:
    signed = "https://me:secret@host/x.tar?part=3&X-Amz-Signature=0123456789abcdef0123"
    assert shown(signed) == "https://host/x.tar?part=3&X-Amz-Signature=..."


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://me:p@ss@host/x.tar", "https://host/x.tar"),
        ("https://host/x.tar?token=abc&part=3", "https://host/x.tar?token=...&part=3"),
        ("https://host/a@b.tar", "https://host/a@b.tar"),
        (
            "pipe:curl -H 'Authorization: Bearer abc.def' https://host/x.tar",
            "pipe:curl -H 'Authorization: Bearer ...' https://host/x.tar",
        ),
        ("pipe:tool --password=abc --token abc x.tar", "pipe:tool --password=... --token ... x.tar"),
        ("pipe:cat /d/tokens/x.tar", "pipe:cat /d/tokens/x.tar"),
    ],
)
def test_passwords_and_short_secrets_are_not_shown(address: str, expected: str) -> None:
    assert shown(address) == expected


def test_names_in_the_cache() -> None:
    urls = [
        "https://host/a/train-000.tar?key=1",
        "https://host/b/train-000.tar",
        "pipe:aws s3 cp s3://b/train-000.tar -",
    ]
    names = [cache_name(url) for url in urls]
    assert len(set(names)) == 3
    assert all(name.startswith("train-000.") and name.endswith(".tar") for name in names)
    assert cache_name("https://host/get?file=../../etc/x") == cache_name("https://host/get?file=../../etc/x")
    assert cache_name("https://host/get?id=1").startswith("shard.")
    assert len(cache_name(f"https://host/{'n' * 300}.tar")) < 120


def test_http(server: FileServer) -> None:
    assert read(server.url("x.tar")) == CONTENT
    assert remote_size(server.url("x.tar"), SECONDS) == len(CONTENT)


def test_an_error_of_the_server_that_passes_while_curl_waits(server: FileServer) -> None:
    server.faults["GET", "x.tar"] = ["500"]
    assert read(server.url("x.tar")) == CONTENT
    assert server.requests["GET", "x.tar"] == 2


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("404", FileNotFoundError),
        ("410", FileNotFoundError),
        ("403", PermissionError),
        ("401", PermissionError),
    ],
)
def test_refusals_of_the_server_are_told_apart(server: FileServer, status: str, kind: type[OSError]) -> None:
    server.faults = {(method, "x.tar"): [status] for method in ("HEAD", "GET")}
    with pytest.raises(kind, match=f"^HTTP status {status}"):
        read(server.url("x.tar"))


def test_the_size_before_a_transfer(server: FileServer) -> None:
    server.faults["HEAD", "x.tar"] = ["503", "404", "403", "501", "unknown"]
    with pytest.raises(OSError, match=r"^HTTP status 503$"):
        remote_size(server.url("x.tar"), SECONDS)
    with pytest.raises(FileNotFoundError, match=r"^HTTP status 404"):
        remote_size(server.url("x.tar"), SECONDS)
    assert [remote_size(server.url("x.tar"), SECONDS) for _ in range(4)] == [None, None, None, len(CONTENT)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cut", r"closed before the end of the file \(curl exit status 18\)"),
        ("long", r"closed before the end of the file \(curl exit status 18\)"),
        ("stall", r"^no byte for 1 s$"),
    ],
)
def test_a_body_that_ends_early_is_an_error(server: FileServer, fault: str, message: str) -> None:
    server.faults["GET", "x.tar"] = [fault]
    received = []
    with pytest.raises(OSError, match=message):
        received.extend(read_remote(server.url("x.tar"), SHORT if fault == "stall" else SECONDS))
    assert CONTENT.startswith(b"".join(received)) and len(received)


def test_a_host_that_does_not_answer() -> None:
    with serving() as server:
        url = server.url("x.tar")
    for transfer in (read, lambda url: remote_size(url, SECONDS)):
        with pytest.raises(OSError, match=r"^no connection to the host \(curl exit status 7\)$"):
            transfer(url)


def test_leaving_a_transfer_ends_its_process(server: FileServer) -> None:
    server.faults["GET", "x.tar"] = ["stall"]
    pieces = read_remote(server.url("x.tar"), 60)
    assert next(pieces)
    pieces.close()


def test_a_command(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(CONTENT)
    assert read(f"pipe:cat {tmp_path}/x.tar") == CONTENT
    assert remote_size(f"pipe:cat {tmp_path}/x.tar", SECONDS) is None


@pytest.mark.parametrize(
    ("command", "kind", "message"),
    [
        ("cat /nowhere/x.tar", OSError, r"^its command failed \(exit status 1\)$"),
        ("echo begin; exit 23", OSError, r"exit status 23"),
        ("echo begin; exit 141", OSError, r"exit status 141"),
        ("echo begin; kill -9 $$", OSError, r"exit status -9"),
        ("no-such-program x", InputError, r"^pipe:no-such-program x: its command cannot be run here .*127"),
        ("echo begin; sleep 60 | sleep 60", TimeoutError, r"^no byte for 1 s$"),
        ("echo begin; exec 1>&-; sleep 60", TimeoutError, "does not end within 1 s of its output"),
    ],
)
def test_commands_that_fail(command: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read(f"pipe:{command}", SHORT if kind is TimeoutError else SECONDS)


def test_a_stalled_command_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(TimeoutError):
        read(f"pipe:(sleep 60 & echo $! > {pid_file}; wait) | cat", SHORT)
    stat = Path(f"/proc/{pid_file.read_text().strip()}/stat")
    assert (
        not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    )  # init has yet to reap it


def test_other_schemes_are_read_by_fsspec() -> None:
    fsspec.filesystem("memory").pipe("/bucket/x.tar", CONTENT)
    assert read("memory://bucket/x.tar") == CONTENT
    assert remote_size("memory://bucket/x.tar", SECONDS) == len(CONTENT)
    with pytest.raises(FileNotFoundError):
        read("memory://bucket/y.tar")
    with pytest.raises(FileNotFoundError):
        remote_size("memory://bucket/y.tar", SECONDS)


class _Troubled(MemoryFileSystem):  # type: ignore[misc]
    """A store whose client waits without end, or raises errors of its own."""

    protocol = "troubled"

    def open(self, path: str, mode: str = "rb", **_: object) -> object:
        if "slow" in path:
            read_end, _write_end = os.pipe()
            return os.fdopen(read_end, "rb")
        raise RuntimeError("quota\nexceeded")


def test_clients_that_stall_or_fail() -> None:
    fsspec.register_implementation("troubled", _Troubled, clobber=True)
    with pytest.raises(TimeoutError, match=r"^no byte for 0.2 s$"):
        read("troubled://slow/x.tar", 0.2)
    with pytest.raises(OSError, match=r"^RuntimeError: quota exceeded$"):
        read("troubled://x.tar")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("curl") is None
    for url, message in {
        "s3://b/x.tar": r"^s3://b/x.tar: s3:// is read with the package s3fs; install it$",
        "scp://h/x.tar": r"^scp://h/x.tar: scp:// is read with the program curl; install it$",
        "ais://b/x.tar": r"with the program ais; install it$",
        "nope://b/x.tar": r"^nope://b/x.tar: nothing here reads nope://; use pipe:COMMAND",
    }.items():
        for transfer in (read, lambda url: remote_size(url, SECONDS)):
            with pytest.raises(InputError, match=message):
                transfer(url)


def test_addresses_may_be_rewritten_as_webdataset_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: FileServer
) -> None:
    (tmp_path / "x.tar").write_bytes(CONTENT[:1000])
    rules = f"http://mirror/={tmp_path}/;s3://bucket/={server.url('')}"
    monkeypatch.setenv("GOPEN_REWRITE", rules)
    assert read("http://mirror/x.tar") == CONTENT[:1000]
    assert remote_size("http://mirror/x.tar", SECONDS) == 1000
    assert read("s3://bucket/x.tar") == CONTENT
    assert remote_size("s3://bucket/x.tar", SECONDS) == len(CONTENT)
