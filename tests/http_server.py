"""What the small HTTP servers of the tests share: how they answer, and that they run in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JsonHandler(BaseHTTPRequestHandler):
    """Answers with bytes as they are, or with anything else as JSON."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer waits 40 ms for an acknowledgement

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `requests` instead of a log."""


class Server(ThreadingHTTPServer):
    """A server of this machine alone."""

    request_queue_size = 64
    PORT = 0  # any that is free

    def __init__(self, handler: type[JsonHandler]) -> None:
        super().__init__(("127.0.0.1", self.PORT), handler)


@contextmanager
def listening(server: Server, *, before_the_end: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Url of `server` while it runs; `before_the_end` lets go of requests that wait."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            before_the_end()
            server.shutdown()
            thread.join()
