"""A vLLM server that is killed: at aimed moments of a real training run, and in every phase of its life."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import psutil
import pytest

from keel import config_load
from keel.engines.base import EngineError, GenerateResult
from keel.engines.vllm.client import VllmClient
from keel.engines.vllm.server import VllmServer
from keel.loop import train
from keel.rollouts.store import read_step_record
from tests.vllm_servers import OneEngine, ask, until_at_server

STEPS = 6  # more than the kills need: a server may have answered before it could be held, and dies at the next call
EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm.toml"


@dataclass
class Death:
    """A kill: when call `number` of `method` since the last kill (or a later one), to a server with the weights of
    `version` or newer ones, is under way, or was just answered. Calls that give a new server its weights do not count.

    Filled in by the kill: how many requests the server was drawing for, and how the call that was under way ended.
    """

    method: str
    moment: Literal["during", "after"]
    version: int
    number: int
    running: int = -1
    ended: str = ""


class Killer:
    """Kills the server that runs, at the moments of `deaths`, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, deaths: list[Death]) -> None:
        self.due = list(deaths)
        self.killed: list[Death] = []
        self.servers: list[VllmServer] = []
        self.version = -1
        self._settled = False  # whether the server has the weights that it should
        self._calls: Counter[str] = Counter()
        start = VllmServer.start.__func__  # type: ignore[attr-defined]

        def started(cls: Any, *arguments: Any, **options: Any) -> VllmServer:
            self.servers.append(start(cls, *arguments, **options))
            return self.servers[-1]

        monkeypatch.setattr(VllmServer, "start", classmethod(started))
        for method in ("generate", "pause", "collective_rpc", "set_weight_version"):
            monkeypatch.setattr(VllmClient, method, self._aimed(method, getattr(VllmClient, method)))

    def _aimed(self, method: str, original: Any) -> Any:
        async def call(client: VllmClient, *arguments: Any, **options: Any) -> Any:
            death = self._of(method, arguments)
            work = asyncio.ensure_future(original(client, *arguments, **options))
            if death is not None and death.moment == "during":
                return await self._during(death, work)
            result = await work
            if method == "set_weight_version":
                self.version, self._settled = int(arguments[0]), True
            if death is not None:
                self._kill(death)
            return result

        return call

    def _of(self, method: str, arguments: tuple[Any, ...]) -> Death | None:
        """The death that this call is for."""
        if method == "generate" and arguments[0]["sampling_params"]["max_tokens"] == 1:
            return None  # a look at what the server does, not an episode's
        if not self._settled:
            return None
        self._calls[method] += 1
        if not self.due or self.due[0].method != method or self.version < self.due[0].version:
            return None
        return self.due.pop(0) if self._calls[method] >= self.due[0].number else None

    async def _during(self, death: Death, work: asyncio.Future[Any]) -> Any:
        """Kill it while its workers are held: in the midst of their draws, or with a push before them.

        A reply that came before they could be held leaves the death to the next call.
        """
        server = self.servers[-1]
        family = psutil.Process(server.pid).children(recursive=True)
        drawing = death.method == "generate"
        while True:
            for process in family:
                process.suspend()
            for _ in range(3):  # each is answered after the call has been sent, and what was drawn before has come
                death.running = await asyncio.to_thread(drawing_for, server)
            if work.done() or death.running or not drawing:
                break
            for process in family:
                process.resume()
            await asyncio.sleep(0.004)  # some tokens' time
        if work.done():
            self.due.insert(0, death)
            for process in family:
                process.resume()
            return await work
        self._kill(death, family)
        try:
            return await work
        except EngineError as error:
            death.ended = f"{type(error).__name__} of {type(error.__cause__).__name__}"
            raise

    def _kill(self, death: Death, held: Sequence[psutil.Process] = ()) -> None:
        server = self.servers[-1]
        os.kill(server.pid, signal.SIGKILL)
        for process in held:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        assert server.wait_dead(60)
        self.killed.append(death)
        self._settled = False
        self._calls.clear()


def drawing_for(server: VllmServer) -> int:
    """How many requests the server draws for, by its own metrics."""
    with urlopen(f"{server.url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return int(sum(map(float, re.findall(r"^vllm:num_requests_running{.*} (\S+)$", text, re.MULTILINE))))


def test_a_run_whose_server_is_killed_five_times_is_whole(
    vllm_python: str, one_engine: OneEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in mid-generation, in mid-push, and between start and finish of an update, before and after its push."""
    one_engine.close()
    deaths = [
        Death("generate", "during", version=0, number=6),  # in mid-generation
        Death("pause", "after", version=0, number=1),  # an update has begun, nothing is written
        Death("collective_rpc", "during", version=1, number=1),  # in mid-push
        Death("generate", "during", version=2, number=10),
        Death("collective_rpc", "after", version=2, number=1),  # all is written, and the version not yet named
    ]
    killer = Killer(monkeypatch, deaths)
    run_dir = tmp_path / "run"
    sets = [
        *(
            f"run_dir={str(run_dir)!r}",
            f"steps={STEPS}",
            "optim.warmup_steps=0",
            "warm_start.steps=0",
            "eval.num_tasks=0",
        ),
        *("rollout.groups_per_step=4", "rollout.group_size=4", "engine.vllm.max_restarts=5", "record.every=1"),
        *(f"engine.vllm.python={vllm_python!r}", "engine.vllm.kv_cache_gib=0.25", "report.at_end=false"),
        *("sync.check_every=0", "warm_start.optim.warmup_steps=0", "eval.num_tasks=0"),
    ]
    summary = train(config_load.parse(EXAMPLE.read_text(encoding="utf-8"), "vllm.toml", sets))

    assert summary.state == "completed"
    assert killer.killed == deaths
    for death in deaths:
        if death.moment == "during":  # the request had been sent, and its answer never came
            assert death.ended in ("ServerGoneError of ReadError", "ServerGoneError of RemoteProtocolError")
        if death.method == "generate":
            assert death.running >= 1
    assert len(killer.servers) == 6
    assert not any(server.alive() for server in killer.servers)
    for step in range(STEPS):
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


def test_a_server_that_dies_is_started_again_and_the_last_time_it_is_an_error_with_its_log(
    one_engine: OneEngine,
) -> None:
    """At first it loses the process that computes: the one that answers lives on for a moment, and says it is well."""
    engine = one_engine(max_restarts=1)
    server = engine.host.server
    assert server is not None
    (inner,) = [each for each in psutil.Process(server.pid).children() if "EngineCore" in each.name()]

    async def main() -> GenerateResult:
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask(length=40)))
        await until_at_server(engine, lambda number: number == 1)
        inner.kill()
        await asyncio.to_thread(server.wait_dead, 60)
        await engine.resume()
        return await task

    result = asyncio.run(main())
    assert len(result.token_ids) == 40
    assert engine.host.restarts == 1
    last = engine.host.server
    assert last is not None
    assert last is not server
    os.kill(last.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"engine\.vllm\.max_restarts is 1.*vllm") as raised:
        asyncio.run(engine.generate(ask()))
    assert str(last.log_path) in str(raised.value)
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
