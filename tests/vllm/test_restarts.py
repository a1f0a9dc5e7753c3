"""A vLLM server that is killed: at aimed moments of a real training run, and in every phase of its life."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from keel import config_load
from keel.engines.base import EngineError, GenerateResult
from keel.engines.vllm.client import VllmClient
from keel.engines.vllm.server import VllmServer
from keel.loop import train
from keel.rollouts.store import read_step_record
from tests.vllm_servers import OneEngine, ask, until_at_server

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm.toml"


class Killer:
    """Kills the server at aimed moments: `moments` by call of the client, how many of these calls go before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.aims: list[tuple[str, str, int]] = []
        self.killed: list[str] = []
        self.calls: dict[str, int] = {}
        self.server: Callable[[], VllmServer | None] = lambda: None
        for method in ("generate", "collective_rpc", "set_weight_version", "pause", "reset_prefix_cache"):
            monkeypatch.setattr(VllmClient, method, self._aimed(method, getattr(VllmClient, method)))

    def aim(self, method: str, moment: str, number: int) -> None:
        """Kill it when call `number` of `method` from now on is under way ("during") or has been answered ("after")."""
        self.aims.append((method, moment, self.calls.get(method, 0) + number))

    def _aimed(self, method: str, original: Any) -> Any:
        async def call(client: VllmClient, *arguments: Any, **options: Any) -> Any:
            number = self.calls[method] = self.calls.get(method, 0) + 1
            during = (method, "during", number) in self.aims
            after = (method, "after", number) in self.aims
            if not during:
                result = await original(client, *arguments, **options)
                if after:
                    self._kill(f"{method} after")
                return result
            task = asyncio.ensure_future(original(client, *arguments, **options))
            await asyncio.sleep(0.02)  # the request is at the server, and cannot be answered yet
            self._kill(f"{method} during")
            return await task

        return call

    def _kill(self, name: str) -> None:
        server = self.server()
        assert server is not None
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait_dead(30)
        self.killed.append(name)


def test_a_run_whose_server_is_killed_five_times_is_whole(
    vllm_python: str, one_engine: OneEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-generation, in mid-push, between start and finish of an update (twice), and between two requests."""
    one_engine.close()
    killer = Killer(monkeypatch)
    live: list[VllmServer] = []
    start = VllmServer.start.__func__  # type: ignore[attr-defined]

    def started(cls: Any, *arguments: Any, **options: Any) -> VllmServer:
        live.append(start(cls, *arguments, **options))
        return live[-1]

    monkeypatch.setattr(VllmServer, "start", classmethod(started))
    killer.server = lambda: live[-1]
    # Calls before the run's own: four of generate and one of set_weight_version, when the server is looked at. A server
    # that is started again gets weights too, so each death counts one more.
    killer.aim("generate", "during", 12)
    killer.aim("collective_rpc", "during", 3)
    killer.aim("generate", "after", 45)
    killer.aim("collective_rpc", "after", 6)
    killer.aim("set_weight_version", "after", 7)
    run_dir = tmp_path / "run"
    sets = [
        *(f"run_dir={str(run_dir)!r}", "steps=3", "optim.warmup_steps=0", "warm_start.steps=0", "eval.num_tasks=0"),
        *("rollout.groups_per_step=4", "rollout.group_size=4", "engine.vllm.max_restarts=5", "record.every=1"),
        *(f"engine.vllm.python={vllm_python!r}", "engine.vllm.kv_cache_gib=0.25", "report.at_end=false"),
        *("sync.check_every=0", "warm_start.optim.warmup_steps=0"),
    ]
    summary = train(config_load.parse(EXAMPLE.read_text(encoding="utf-8"), "vllm.toml", sets))

    assert summary.state == "completed"
    assert len(killer.killed) == 5, killer.killed
    assert len(live) == 6
    assert not any(server.alive() for server in live)
    for step in range(3):
        lines = (run_dir / "trajectories" / f"{step:06d}.jsonl").read_text(encoding="utf-8").splitlines()
        attempts = [json.loads(line) for line in lines]
        assert len(attempts) == 16, "an episode was lost or doubled"
        assert len({(each["group_id"], each["attempt"]) for each in attempts}) == 16
        assert {each["status"] for each in attempts} <= {"completed", "truncated"}, (
            "an engine's death became an outcome"
        )
        streams, _ = read_step_record(run_dir / "steps" / f"{step:06d}.safetensors")
        drawn = streams["loss_mask"].astype(bool)
        assert set(streams["policy_version"][drawn].tolist()) == {step}
        assert abs(streams["rollout_logprobs"] - streams["logprobs"])[drawn].mean() <= 5e-6


def test_a_server_that_loses_its_inner_process_is_started_again(one_engine: OneEngine) -> None:
    """The process that answers lives on for a moment and says that it is well; the one that computes is gone."""
    engine = one_engine()
    server = engine.host.server
    assert server is not None
    (inner,) = [each for each in psutil.Process(server.pid).children() if "EngineCore" in each.name()]

    async def main() -> GenerateResult:
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask(length=40)))
        await until_at_server(engine, lambda number: number == 1)
        inner.kill()
        await asyncio.to_thread(server.wait_dead, 60)
        await asyncio.sleep(0)
        await engine.resume()
        return await task

    result = asyncio.run(main())
    assert len(result.token_ids) == 40
    assert engine.host.restarts == 1
    assert engine.host.server is not server


def test_a_server_that_dies_too_often_is_an_engine_error_with_its_log(one_engine: OneEngine) -> None:
    engine = one_engine(max_restarts=0)
    server = engine.host.server
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"engine\.vllm\.max_restarts is 0.*vllm") as raised:
        asyncio.run(engine.generate(ask()))
    assert str(server.log_path) in str(raised.value)
    assert not asyncio.run(engine.health()).ok


ORPHAN = """
import os, sys
from pathlib import Path
from keel.config_vllm import VllmConfig
from keel.engines.vllm.server import VllmServer
config = VllmConfig(python=sys.argv[1], kv_cache_gib=0.25)
server = VllmServer.start(sys.argv[2], config, dtype="float32", max_sequence_tokens=64, log_path=Path(sys.argv[3]))
import psutil
family = [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]
print(*family, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_server_whose_owner_is_killed_leaves_no_process(
    vllm_python: str, vllm_model: Callable[..., str], one_engine: OneEngine, tmp_path: Path
) -> None:
    one_engine.close()
    command = [sys.executable, "-c", ORPHAN, vllm_python, vllm_model(), str(tmp_path / "vllm.log")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    owner = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    assert owner.returncode == -signal.SIGKILL
    family = [int(number) for number in owner.stdout.split()]
    assert len(family) >= 3
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process).wait(timeout=60)
        assert not psutil.pid_exists(process)
