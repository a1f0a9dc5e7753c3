"""`keel report --serve`: the report of a run as it is now, with every recorded step in full, for this machine alone.

    GET /<secret>/              the page
    GET /<secret>/data.json     what it shows, anew
    GET /<secret>/step/137.json STEP 137 in full (`keel.report.episodes`)

The page asks by relative address. Nothing else is served: a path is compared with these three and never becomes a file
name. The server listens on the loopback interface, answers GET alone, refuses a Host that is not this machine (so that
a stranger's page cannot reach it under a name of its own), and its addresses begin with a secret drawn at its start (so
that other users of the machine, and other pages of the browser, do not know them).
"""

from __future__ import annotations

import re
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from keel.monitor.rows import RunDirectoryError
from keel.report.data import report_data
from keel.report.episodes import read_step, step_json
from keel.report.plain import to_json
from keel.report.source import config_of
from keel.report.tokens import find_token_text
from keel.report.write import page
from keel.runs import load_run

LIVE_BYTES, LIVE_STEPS = 3_000_000, 6
"""A live page asks for the steps it is to show, and for everything else anew and anew: that is kept small."""
LOCAL_NAMES = ("127.0.0.1", "localhost")
_STEP = re.compile(r"step/(0|[1-9][0-9]{0,8})\.json")


class ReportServer(ThreadingHTTPServer):
    """Serves one run on 127.0.0.1. `address` is where its page is; `serve_forever` and `shutdown` as usual."""

    daemon_threads = True

    def __init__(self, run_dir: str | Path, port: int = 0) -> None:
        """`port` 0: any that is free. Raises RunDirectoryError if `run_dir` is no run, OSError for a port in use."""
        self.run_dir = load_run(run_dir).path
        self.secret = secrets.token_urlsafe(16)
        self._one_at_a_time = threading.Lock()
        self._made: tuple[Any, str] = (None, "")
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.secret}/"

    def data(self) -> str:
        """The report's data as JSON, made anew if the run's files changed since."""
        with self._one_at_a_time:
            state = _changes(self.run_dir)
            if self._made[0] != state:
                self._made = (state, to_json(self._report()))
            return self._made[1]

    def _report(self) -> dict[str, Any]:
        return report_data(self.run_dir, live=True, budget_bytes=LIVE_BYTES, max_steps=LIVE_STEPS)

    def step(self, number: int) -> str | None:
        """STEP `number` in full as JSON, or None if it was not recorded or cannot be read."""
        run = load_run(self.run_dir)
        step = read_step(run, number)
        if step is None:
            return None
        config = config_of(run)
        return to_json(step_json(step, find_token_text(run, config.model.path if config is not None else "")))

    def answer(self, path: str) -> tuple[str, str] | None:
        """Content type and text for the path of a request, or None if there is nothing."""
        prefix, rest = f"/{self.secret}/", urlsplit(path).path
        if not secrets.compare_digest(rest[: len(prefix)].encode(), prefix.encode()):
            return None
        rest = rest[len(prefix) :]
        if rest == "":
            return "text/html; charset=utf-8", page("template.html", self.data(), live=True)
        if rest == "data.json":
            return "application/json", self.data()
        if match := _STEP.fullmatch(rest):
            text = self.step(int(match[1]))
            return None if text is None else ("application/json", text)
        return None


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version = "keel"
    sys_version = ""

    def do_GET(self) -> None:
        if not _is_local(self.headers.get("Host", "")):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "This server answers to 127.0.0.1 and localhost alone.\n")
            return
        try:
            found = self.server.answer(self.path)
        except RunDirectoryError as error:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", f"{error}\n")
            return
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "There is nothing here.\n")
        else:
            self._send(HTTPStatus.OK, *found)

    def _send(self, status: HTTPStatus, content_type: str, text: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing: what a request holds is foreign, and a terminal is no place for it."""


def _is_local(host: str) -> bool:
    name, _, port = host.partition(":")
    return name.lower() in LOCAL_NAMES and (port.isdecimal() or not port)


def _changes(run_dir: Path) -> Any:
    """What changes when the report would: times and sizes of the files it is made of, and the number of records."""
    names = ("metrics.jsonl", "status.json", "summary.json", "config.toml")
    files = [run_dir / name for name in names] + [run_dir / "steps", run_dir / "trajectories"]
    stats = [path.stat() for path in files if path.exists()]
    return [(stat.st_mtime_ns, stat.st_size) for stat in stats]
