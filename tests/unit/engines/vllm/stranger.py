"""A real HTTP server that answers as it is told: what a vLLM server must not be taken for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
"""Status and body: bytes are sent as they are, anything else as JSON."""


@contextmanager
def serving(answer: Callable[[str, Mapping[str, Any]], Answer]) -> Iterator[str]:
    """The address of a server that answers `answer(path, body)`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one piece

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            status, content = answer(self.path.split("?")[0], body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer  # noqa: N815 (names of the standard library's)

        def log_message(self, *arguments: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Vllm:
    """Answers as vLLM does, draws the token 5 always: to be spoilt in one place by a test."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.bodies: list[Mapping[str, Any]] = []

    def __call__(self, path: str, body: Mapping[str, Any]) -> Answer:
        if path in self.changes:
            change = self.changes[path]
            return change(body) if callable(change) else change
        if path == "/health":
            return 200, b""
        if path == "/v1/models":
            return 200, {"data": [{"id": "m", "root": self.changes.get("root", ""), "max_model_len": 64}]}
        if path == "/v1/completions":
            self.bodies.append(body)
            return 200, {"choices": [self.choice(body)], "usage": {}}
        return 404, {"detail": "Not Found"}

    def choice(self, body: Mapping[str, Any]) -> dict[str, Any]:
        number = body["max_tokens"]
        half = -0.6931471805599453
        processed = self.changes.get("mode", "processed") == "processed"
        third = -9999.0 if processed and body["top_k"] == 2 else -2.0
        row = {"token_id:5": half, "token_id:6": half if processed else -1.5, "token_id:7": third}
        return {
            "token_ids": [5] * number,
            "logprobs": {"token_logprobs": [half] * number, "top_logprobs": [row] * number},
            "finish_reason": "length",
        }
