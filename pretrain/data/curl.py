"""What curl says about an address: the size of the file, and why a transfer failed. No torch.

webdataset reads http addresses with curl. This asks with the same program, so that the same proxies,
certificates and passwords (~/.curlrc, ~/.netrc, the environment) count.
"""

import re
import subprocess
from typing import NamedTuple

HTTP_ERROR = 22  # curl's exit status for an answer of 400 or above
EXIT_STATUS = {
    3: "the address is malformed",
    6: "the host name is not known",
    7: "no connection to the host",
    18: "the connection closed before the end of the file",
    28: "timed out",
    35: "no secure connection (TLS)",
    52: "the server answered nothing",
    56: "the connection broke",
    60: "the server's certificate is not trusted",
    63: "the file is too large",
    67: "login denied",
    78: "no such file",
}
NOT_FOUND, NO_ACCESS = (404, 410), (401, 403, 407, 451)
BUSY = (408, 425, 429)  # and those from 500 on: the same request may be answered later
NO_HEAD = 501  # of a server that only knows GET


class Head(NamedTuple):
    """The answer to a HEAD request."""

    status: int  # of HTTP
    size: int | None  # bytes of the file


def head(url: str, seconds: float) -> Head:
    """Ask a server for the headers of a file.

    Args:
        url: `http://...` or `https://...`.
        seconds: for the whole answer.

    Raises:
        OSError: there was none.
    """
    command = ["curl", "--silent", "--head", "--location", "--max-time", f"{seconds:g}", url]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=seconds + 5, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no answer for {seconds:g} s") from error
    if done.returncode:
        raise exit_error(done.returncode)
    answer = re.split(r"(?m)^HTTP/", done.stdout.decode("latin-1"))[-1]  # behind redirections
    status = re.match(r"\S+ +(\d{3})", answer)
    sizes = re.findall(r"(?im)^content-length: *(\d+)\s*$", answer)
    encoded = re.search(r"(?im)^content-encoding: *(?!identity)\S", answer)
    known = status is not None and status[1] == "200" and sizes and not encoded
    return Head(int(status[1]) if status else 0, (int(sizes[-1]) or None) if known else None)


def refusal(status: int) -> OSError | None:
    """The error for a status of HTTP; None where it says nothing about a GET of the same file."""
    if status in NOT_FOUND:
        return FileNotFoundError(f"HTTP status {status} (no such file)")
    if status in NO_ACCESS:
        return PermissionError(f"HTTP status {status} (no access)")
    passing = status in BUSY or (status >= 500 and status != NO_HEAD)
    return OSError(f"HTTP status {status}") if passing else None


def exit_error(status: int) -> OSError:
    """The error for an exit status of curl."""
    reason = f"{EXIT_STATUS.get(status, 'failed')} (curl exit status {status})"
    return FileNotFoundError(reason) if status == 78 else OSError(reason)


def transfer_error(url: str, status: int, seconds: float) -> OSError:
    """Why the GET of an http address failed; the server is asked again, since curl only says "22"."""
    if status == HTTP_ERROR:
        try:
            found = refusal(head(url, seconds).status)
        except OSError as error:
            found = error
        return found or OSError(f"the server refused it (curl exit status {status})")
    return exit_error(status)
