"""The bytes and the size of a remote shard, through webdataset's gopen or fsspec.

A transfer gives all bytes or ends with an error: a child process that fails, a connection that breaks and one
that stalls are never a short file. No child process outlives its transfer.

No torch, but webdataset imports it where it is installed; that takes a second.
"""

import os
import select
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import fsspec
from fsspec.registry import known_implementations
from webdataset.gopen import (
    Pipe,
    gopen,
    gopen_ais,
    gopen_curl,
    gopen_gsutil,
    gopen_hf,
    gopen_htgs,
    gopen_schemes,
    rewrite_url,
    set_options,
)

from pretrain.data.aside import aside
from pretrain.data.curl import head, refusal, transfer_error
from pretrain.data.remote import is_remote, local_path, scheme, shown
from pretrain.data.retry import one_line
from pretrain.errors import InputError
from pretrain.processes import kill_tree

CHUNK = 1 << 20  # bytes
PROGRAMS = {  # that webdataset's handlers start
    gopen_curl: "curl",
    gopen_htgs: "curl",
    gopen_hf: "curl",
    gopen_gsutil: "gsutil",
    gopen_ais: "ais",
}
CANNOT_RUN = (126, 127)  # the shell's exit status where there is no such program


def read_remote(url: str, seconds: float) -> Generator[bytes, None, None]:
    """The bytes of a remote file, piece by piece; close the iterator to end the transfer.

    Args:
        url: `scheme://...` or `pipe:command`.
        seconds: without a byte, after which the transfer counts as failed.

    Raises:
        InputError: the address cannot be read here; names the program or package to install.
        OSError: the transfer failed; FileNotFoundError and PermissionError where that will not change.
    """
    target = rewrite_url(url)
    if not _by_gopen(target):
        yield from _read_aside(lambda: _open_fsspec(target), seconds)
        return
    stream = _open_gopen(url)
    if isinstance(stream, Pipe):
        yield from _read_pipe(stream, target, seconds)
    else:
        yield from _read_aside(lambda: stream, seconds)


def remote_size(url: str, seconds: float) -> int | None:
    """Bytes of a remote file; None where the transport does not tell.

    Raises:
        InputError: the address cannot be read here.
        OSError: the server cannot be reached, has no such file, or fails.
    """
    target = rewrite_url(url)
    kind = scheme(target)
    if not is_remote(target):
        return os.stat(local_path(target)).st_size  # noqa: PTH116  (as gopen opens it)
    if kind in ("http", "https") and _by_gopen(target):
        answer = head(target, seconds)
        failure = refusal(answer.status)
        if failure and not isinstance(failure, PermissionError):  # signed addresses may allow GET alone
            raise failure
        return answer.size
    if kind == "hf" or not _by_gopen(target):
        return next(aside(lambda: iter([_size_by_fsspec(target)]), seconds))
    return None


def tells_missing(url: str) -> bool:
    """Whether the transport of an address tells a file that does not exist from a failure."""
    target = rewrite_url(url)
    return scheme(target) in ("", "file", "http", "https", "hf") or not _by_gopen(target)


def _by_gopen(target: str) -> bool:
    """Whether webdataset reads an address; otherwise fsspec does.

    Raises:
        InputError: neither can.
    """
    kind = scheme(target)
    handler = gopen_schemes.get(kind)
    program = PROGRAMS.get(handler, "")
    if kind in ("", "file") or (handler and (not program or shutil.which(program))):
        return True
    try:
        fsspec.get_filesystem_class(kind)
    except (ImportError, ValueError) as error:
        raise InputError(f"{shown(target)}: {_missing(kind, program)}") from error
    return False


def _missing(kind: str, program: str) -> str:
    """What has to be installed to read a scheme."""
    known = known_implementations.get(kind)
    package = known["class"].partition(".")[0] if known else ""
    wanted = [f"the program {program}"] if program else []
    if package and package != "fsspec":
        wanted.append(f"the package {package}")
    if not wanted and known:
        return one_line(ImportError(known.get("err", f"{kind}:// cannot be read")))
    if not wanted:
        return f"nothing here reads {kind}://; use pipe:COMMAND with a command that writes the shard"
    return f"{kind}:// is read with {' or '.join(wanted)}; install it"


def _open_gopen(url: str) -> Any:
    try:
        return gopen(url)
    except ImportError as error:
        raise InputError(f"{shown(url)}: needs the package {error.name}; install it") from error
    except ValueError as error:
        raise InputError(f"{shown(url)}: {one_line(error)}") from error
    except OSError:
        raise
    except Exception as error:  # what the client of a store raises of its own
        raise OSError(f"{type(error).__name__}: {one_line(error)}") from error


def _read_pipe(stream: Pipe, target: str, seconds: float) -> Generator[bytes, None, None]:
    """The output of a child process, which has to end with status 0.

    The pipe is read below the methods of `Pipe`: those wait without end, let some failures pass (statuses 23
    and 141), and show the whole command, tokens included.
    """
    try:
        set_options(stream, timeout=seconds)
        while chunk := _next_bytes(stream.stream, seconds):
            yield chunk
        status = stream.proc.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"its command does not end within {seconds:g} s of its output") from error
    finally:
        if stream.proc.poll() is None:
            kill_tree(stream.proc.pid)
        with suppress(OSError):
            stream.close()
    if status:
        raise _child_error(target, status, seconds)


def _next_bytes(file: BinaryIO, seconds: float) -> bytes:
    """What comes next; empty at the end."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    if not poll.poll(seconds * 1000):
        raise TimeoutError(f"no byte for {seconds:g} s")
    return os.read(file.fileno(), CHUNK)


def _child_error(target: str, status: int, seconds: float) -> Exception:
    if scheme(target) in ("http", "https"):
        return transfer_error(target, status, seconds)
    if status in CANNOT_RUN:
        return InputError(f"{shown(target)}: its command cannot be run here (exit status {status})")
    program = PROGRAMS.get(gopen_schemes.get(scheme(target)), "its command")
    return OSError(f"{program} failed (exit status {status})")


def _open_fsspec(target: str) -> Any:
    files, path = fsspec.url_to_fs(target)
    return files.open(path, "rb")


def _size_by_fsspec(target: str) -> int | None:
    try:
        files, path = fsspec.url_to_fs(target)
    except ImportError as error:
        raise InputError(f"{shown(target)}: {one_line(error)}") from error
    size = files.size(path)
    return None if size is None else int(size)


def _read_aside(open_file: Callable[[], Any], seconds: float) -> Generator[bytes, None, None]:
    def pieces() -> Iterator[bytes]:
        with open_file() as file:
            while chunk := file.read(CHUNK):
                yield chunk

    return aside(pieces, seconds)
