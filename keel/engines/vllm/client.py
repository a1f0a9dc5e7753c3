"""Raw HTTP to a vLLM server: what is sent and what comes back, as JSON, with every failure typed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2 as httpx

from keel.engines.base import EngineError

SHOWN = 600
CONTROL_TIMEOUT_S = 600.0


class ServerGoneError(EngineError):
    """Nobody answers: the server is dead, dying, or out of reach. What was asked may be asked again."""


class ServerAnswerError(EngineError):
    """The server answered, and not with what was asked for. `status` is the HTTP status, 0 if that was fine."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class VllmClient:
    """Requests to the server at `url`; a connection pool per event loop, so any loop may use it.

    Every method raises ServerGoneError if the server cannot be reached or breaks the connection off, and
    ServerAnswerError if it answers with an error or with something that is not JSON.
    """

    def __init__(self, url: str, *, timeout_s: float = 600.0, api_key: str = "") -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._pools: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}

    # ---- tokens

    async def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Token in, token out (`/inference/v1/generate`). Cancelling closes the connection, and the server aborts."""
        answer = await self.post("/inference/v1/generate", body)
        return _is_object(answer, "/inference/v1/generate")

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Token in, token out by way of `/v1/completions`, which every server has."""
        answer = await self.post("/v1/completions", body)
        return _is_object(answer, "/v1/completions")

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests; those who wait for them get what was drawn, with finish reason "abort"."""
        await self.post("/abort_requests", {"request_ids": list(request_ids)})

    # ---- what it is

    async def is_healthy(self) -> bool:
        """Whether the server says so itself; False too if it cannot be reached."""
        try:
            await self._send("GET", "/health", timeout_s=10.0)
        except EngineError:
            return False
        return True

    async def models(self) -> list[dict[str, Any]]:
        """What it serves: `id`, `root` (the path it was loaded from) and `max_model_len`, by model."""
        answer = _is_object(await self.get("/v1/models"), "/v1/models")
        return [dict(model) for model in answer.get("data", [])]

    async def server_info(self) -> dict[str, Any]:
        """Its whole configuration (development mode only)."""
        return _is_object(await self.get("/server_info", {"config_format": "json"}), "/server_info")

    # ---- control (development mode only)

    async def pause(self, mode: str = "keep") -> None:
        """Draw nothing more until `resume`; "keep" leaves requests where they are."""
        await self.post("/pause", params={"mode": mode})

    async def resume(self) -> None:
        await self.post("/resume")

    async def is_paused(self) -> bool:
        answer = _is_object(await self.get("/is_paused"), "/is_paused")
        return bool(answer.get("is_paused"))

    async def reset_prefix_cache(self, *, running: bool = False) -> bool:
        """Forget keys and values; with `running` those of requests under way too, which are then fed again."""
        params = {"reset_running_requests": "true" if running else "false"}
        answer = _is_object(await self.post("/reset_prefix_cache", params=params), "/reset_prefix_cache")
        return bool(answer.get("success"))

    async def collective_rpc(
        self,
        method: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = 600.0,
    ) -> list[Any]:
        """Call a method of every worker, by name; what they return, in their order."""
        body = {"method": method, "args": list(args), "kwargs": dict(kwargs or {}), "timeout": timeout_s}
        answer = _is_object(await self.post("/collective_rpc", body, timeout_s=timeout_s + 10.0), "/collective_rpc")
        return list(answer.get("results", []))

    async def weight_version(self) -> str:
        answer = _is_object(await self.get("/weight_info"), "/weight_info")
        return str(answer.get("weight_version"))

    async def set_weight_version(self, version: str) -> None:
        """Name what it serves from now on; draws say which they came from."""
        await self.post("/update_weight_version", {"new_version": version})

    async def init_weight_transfer(self, info: Mapping[str, Any]) -> None:
        await self.post("/init_weight_transfer_engine", {"init_info": dict(info)})

    async def start_weight_update(self) -> None:
        await self.post("/start_weight_update")

    async def update_weights(self, info: Mapping[str, Any]) -> None:
        await self.post("/update_weights", {"update_info": dict(info)})

    async def finish_weight_update(self, version: str) -> None:
        await self.post("/finish_weight_update", {"weight_version": version})

    # ---- transport

    async def get(self, path: str, params: Mapping[str, str] | None = None, *, timeout_s: float | None = None) -> Any:
        return _decoded(await self._send("GET", path, params=params, timeout_s=timeout_s), path)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """What `path` answers, decoded; None for an empty answer."""
        return _decoded(await self._send("POST", path, body=body, params=params, timeout_s=timeout_s), path)

    async def close(self) -> None:
        """Close the running loop's connections; another loop's went with it."""
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        self._pools.clear()
        if pool is not None:
            await pool.aclose()

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        try:
            answer = await self._pool().request(
                method,
                self.url + path,
                json=None if body is None else dict(body),
                params=dict(params or {}),
                timeout=timeout_s or self._timeout_s,
            )
        except httpx.TimeoutException as error:
            raise ServerAnswerError(
                f"vllm: {self.url}{path} did not answer within {timeout_s or self._timeout_s:g} s; raise "
                "engine.vllm.request_timeout_s, or see the server's log",
                0,
            ) from error
        except httpx.HTTPError as error:
            raise ServerGoneError(
                f"vllm: {self.url}{path} cannot be reached ({type(error).__name__}: {error})"
            ) from error
        if not answer.is_success:
            raise ServerAnswerError(
                f"vllm: {self.url}{path} answered {answer.status_code}: {_printable(answer.text)}", answer.status_code
            )
        return answer

    def _pool(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            # Connections of a loop that is closed cannot be used, nor closed: they go with their sockets.
            self._pools = {known: kept for known, kept in self._pools.items() if not known.is_closed()}
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            encrypted = self.url.startswith("https:")  # reading the certificates takes half a second
            pool = httpx.AsyncClient(headers=self._headers, limits=limits, trust_env=False, verify=encrypted)
            self._pools[loop] = pool
        return pool


def _decoded(answer: httpx.Response, path: str) -> Any:
    if not answer.content:
        return None
    try:
        return json.loads(answer.content)
    except ValueError as error:
        raise ServerAnswerError(
            f"vllm: {path} answered with what is not JSON: {_printable(answer.text)}; is the address a vLLM server's?",
            0,
        ) from error


def _is_object(answer: Any, path: str) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise ServerAnswerError(f"vllm: {path} answered {_printable(repr(answer))} where an object was expected", 0)
    return answer


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:SHOWN])
