"""A real HTTP server on the loopback, with the faults that servers and networks have."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FileServer(ThreadingHTTPServer):
    """Serves `files`; a request for a file with `faults` uses up the first of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], list[str]] = {}  # by method and name
        self.requests: Counter[tuple[str, str]] = Counter()
        self.closing = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the game."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        self.server.requests[self.command, name] += 1
        faults = self.server.faults.get((self.command, name))
        fault = faults.pop(0) if faults else ""
        if fault.isdigit() or name not in self.server.files:
            self.send_error(int(fault or 404))
            return
        body = self.server.files[name]
        promised = {"short": len(body) // 2, "long": len(body) + 1000}.get(fault, len(body))
        self.send_response(200)
        if fault != "unknown":
            self.send_header("Content-Length", str(promised))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2 if fault in ("cut", "stall", "short") else len(body)])
            self.wfile.flush()
        if fault == "stall":
            self.server.closing.wait()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def serving() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
