"""A vLLM server that Keel started: its life from the command line to the last of its processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError
from urllib.request import urlopen

import keel.sync
from keel.config_vllm import VllmConfig
from keel.engines.base import EngineError
from keel.engines.vllm.command import (
    WORKER_PACKAGE,
    find_python,
    guarded,
    server_arguments,
    server_environment,
)

GRACE_S = 10.0
LOG_LINES_SHOWN = 12
ERRORS_SHOWN = 3
LOG_BYTES_READ = 16 * 2**20
ERROR = re.compile(r"\b[A-Za-z.]*(?:Error|Exception): .+")
POLL_S = 0.2


class VllmServer:
    """One server, running. `url` is its address on the loopback interface, `name` the name it serves the model under
    (its own, so that no other server can be mistaken for it), `pid` the process that answers."""

    def __init__(
        self, guardian: subprocess.Popen[bytes], reserved: socket.socket, directory: Path, *, name: str, log_path: Path
    ) -> None:
        """Use `start`."""
        self.name = name
        self.log_path = log_path
        self.url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        self._guardian = guardian
        self._reserved = reserved
        self._directory = directory
        self._log_start = 0
        self.pid = self._read_number() or 0

    @classmethod
    def start(
        cls,
        model_path: str,
        config: VllmConfig,
        *,
        dtype: str,
        max_sequence_tokens: int,
        log_path: Path,
        model_overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """Start a server for the model at `model_path` and wait until it is healthy.

        `model_overrides` are fields of the model's configuration that this server takes otherwise. What the server
        prints is appended to `log_path`. Raises EngineError, with the log's last lines, if it ends before it is
        healthy or takes longer than `config.startup_timeout_s`; nothing of it is left then.
        """
        python = find_python(config)
        reserved = reserve_port()
        directory = Path(tempfile.mkdtemp(prefix="keel-vllm-"))
        (directory / WORKER_PACKAGE).symlink_to(Path(keel.sync.__file__).parent / "vllm_worker")
        name = f"keel-{secrets.token_hex(8)}"
        arguments = server_arguments(
            config,
            model_path,
            port=reserved.getsockname()[1],
            name=name,
            dtype=dtype,
            max_sequence_tokens=max_sequence_tokens,
            model_overrides=model_overrides or {},
        )
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            log_start = log.tell()
            guardian = subprocess.Popen(  # noqa: S603  (the user's own interpreter)
                guarded([python, *arguments], grace_s=GRACE_S),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=server_environment(config, model_path, directory),
                cwd=directory,  # no module beside the user's files gets into vLLM
                start_new_session=True,  # a Ctrl-C at the terminal is Keel's business
            )
        server = cls(guardian, reserved, directory, name=name, log_path=log_path)
        server._log_start = log_start
        try:
            server._wait_until_healthy(config.startup_timeout_s)
        except BaseException:
            server.close()
            raise
        return server

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._guardian.poll() is None

    def wait_dead(self, timeout_s: float) -> bool:
        """Whether the server, and all that came of it, is gone within `timeout_s` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guardian.wait(timeout_s)
        return not self.alive()

    def log_tail(self, lines: int = LOG_LINES_SHOWN) -> str:
        """The errors that this server named, and the last lines that it printed; control characters spelled out.

        Its first error is the cause, and stands in one process's output long before the last line of another's.
        """
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            text = log.read(LOG_BYTES_READ).decode(errors="replace")
        printed = [line.rstrip() for line in text.splitlines() if line.strip()]
        errors = dict.fromkeys(found.group() for line in printed if (found := ERROR.search(line)))
        shown = [*list(errors)[:ERRORS_SHOWN], "...", *printed[-lines:]] if errors else printed[-lines:]
        return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in shown)

    def close(self) -> None:
        """End the server and every process that came of it: asked first, killed after some seconds. Never raises for
        one that is gone already."""
        if self._guardian.stdin is not None and not self._guardian.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._guardian.stdin.close()
        try:
            self._guardian.wait(GRACE_S + 30.0)
        except subprocess.TimeoutExpired:
            for group in filter(None, (self.pid, self._guardian.pid)):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)
            self._guardian.wait()
        if self._guardian.stdout is not None:
            self._guardian.stdout.close()
        self._reserved.close()
        with contextlib.suppress(OSError):
            (self._directory / WORKER_PACKAGE).unlink(missing_ok=True)
            self._directory.rmdir()

    # ---- until it is healthy

    def _wait_until_healthy(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if self.wait_dead(POLL_S):
                raise EngineError(
                    f"vllm: the server ended with code {self._read_number()} before it was healthy; the last lines of "
                    f"{self.log_path}:\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise EngineError(
                    f"vllm: the server was not healthy within engine.vllm.startup_timeout_s = {timeout_s:g} s; raise "
                    f"it, or see why in {self.log_path}, which ends:\n{self.log_tail()}"
                )

    def _answers(self) -> bool:
        """Healthy, and really this server: it serves the name that only this one was given."""
        try:
            with urlopen(f"{self.url}/health", timeout=5.0):  # noqa: S310  (our own http address)
                pass
            with urlopen(f"{self.url}/v1/models", timeout=5.0) as answer:  # noqa: S310
                served = json.load(answer)
        except (URLError, OSError, ValueError):
            return False
        return any(model.get("id") == self.name for model in served.get("data", []))

    def _read_number(self) -> int | None:
        """The next number that the guardian says: first the process id, in the end the exit code."""
        assert self._guardian.stdout is not None
        line = self._guardian.stdout.readline().strip()
        return int(line) if line else None


def reserve_port() -> socket.socket:
    """A socket bound to a free port of the loopback interface, never listening.

    While it is open nobody else is given the port; vLLM binds with SO_REUSEADDR, as this does, and may have it too.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
