"""A server that is started like vLLM and speaks as much of its language as an engine needs, in a second.

Its weights are one number: it draws that token, always. What is drawn so tells which weights a server really had.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class State:
    token = 1
    version = "default"
    running = threading.Event()
    has_memory = True  # for keys and values
    calls: list[str]

    def __init__(self) -> None:
        self.calls = []
        self.running.set()


STATE = State()
OPTIONS = dict(zip(sys.argv, sys.argv[1:], strict=False))


def generate(body: dict[str, Any]) -> dict[str, Any]:
    settings = body["sampling_params"]
    tokens, spans, content = [], [], []
    for position in range(settings["max_tokens"]):
        if settings["max_tokens"] > 1:
            time.sleep(0.005)
        STATE.running.wait()
        if not STATE.has_memory:
            raise RuntimeError("drawn without memory for keys and values")
        tokens.append(STATE.token)
        if not spans or spans[-1]["version"] != STATE.version:
            spans.append({"version": STATE.version, "start": position, "end": position})
        spans[-1]["end"] = position + 1
        content.append({"token_id": STATE.token, "logprob": 0.0, "top_logprobs": [{"token_id": 1, "logprob": 0.0}]})
    choice = {"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": "length"}
    return {"choices": [{**choice, "weight_versions": spans}]}


def load(body: dict[str, Any]) -> dict[str, Any]:
    weights = json.loads((Path(body["args"][0]) / "weights.safetensors").read_text())
    time.sleep(0.05)
    if weights == "misfit":
        return {"results": [{"problem": "a stranger among the tensors", "broken": False}]}
    STATE.token = 999 if weights == "torn" else weights
    broken = weights == "torn"
    return {"results": [{"problem": "torn" if broken else "", "broken": broken}]}


INFO = {
    "vllm_config": {
        "model_config": {
            "max_logprobs": 64,
            "dtype": "torch.float32",
            "enable_sleep_mode": "--enable-sleep-mode" in sys.argv,
        },
        "cache_config": {"enable_prefix_caching": True},
        "scheduler_config": {"enable_chunked_prefill": False},
        "parallel_config": {"worker_extension_cls": "keel_vllm_worker.extension.WorkerExtension", "world_size": 1},
        "device_config": {"device_type": "cpu"},
    }
}


def answer(path: str, body: dict[str, Any]) -> Any:
    if path == "/v1/models":
        return {"data": [{"id": OPTIONS["--served-model-name"], "max_model_len": 4096}]}
    if path == "/server_info":
        return INFO
    if path == "/inference/v1/generate":
        return generate(body)
    if path == "/collective_rpc":
        return load(body)
    if path == "/pause":
        STATE.running.clear()
    if path in ("/resume", "/wake_up"):
        STATE.has_memory |= path == "/wake_up"
        STATE.running.set()
    if path == "/release_kv_cache_memory":
        STATE.has_memory = False
    if path == "/update_weight_version":
        STATE.version = body["new_version"]
    return {"success": True, "weight_version": STATE.version}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def _answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        data = json.dumps(answer(self.path.split("?")[0], body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _answer  # noqa: N815 (names of the standard library's)

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(OPTIONS["--port"])), Handler)
    server.daemon_threads = True
    server.serve_forever(0.01)
