"""An engine with faults planted in it, otherwise faithful: for tests of what is to find them, and for runs on purpose.

A fault is planted at one of four places, whatever the engine behind is: the model directory it is built from, weights
that are pushed to it later, the request, the result. docs/faults.md has the table.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from keel.distortion import Distortion, DistortionError, random_distortions
from keel.engines.base import (
    Engine,
    EngineCapabilities,
    EngineHealth,
    GenerateRequest,
    GenerateResult,
    ScoreResult,
    WeightSource,
)
from keel.engines.distorted_answers import distorted_result, distorted_score, with_logprobs, without_stop
from keel.engines.distorted_directory import distorted_directory
from keel.engines.distorted_push import DistortedPush
from keel.engines.distorted_requests import Sent, Sessions, sent_request, sent_tokens, told_result, told_score
from keel.engines.embedded.engine import EmbeddedEngine
from keel.models.distorted.modules import flipped, routers_of
from keel.models.distorted.tokens import drawn_for, load_splits

__all__ = ["Distortion", "DistortedEngine", "distort_engine", "random_distortions", "undistorted"]


def distort_engine(
    make_engine: Callable[[Path], Engine],
    model_dir: str | Path,
    distortions: Sequence[Distortion],
    workdir: str | Path | None = None,
) -> DistortedEngine:
    """The engine that `make_engine` builds from a model directory, with `distortions` planted in it.

    What is planted in the directory goes to `workdir`/model; without a `workdir` to a temporary directory, which goes
    when the engine is closed. Raises DistortionError for a fault that this model or engine has no place for.
    """
    source, own = Path(model_dir), None
    if workdir is None:
        own = Path(tempfile.mkdtemp(prefix="keel-distorted-"))
    try:
        directory = distorted_directory(source, distortions, (own or Path(str(workdir))) / "model")
        return DistortedEngine(make_engine(directory), distortions, source, owned_directory=own)
    except BaseException:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        raise


def undistorted(engine: Engine) -> Engine:
    """The engine behind, if `engine` has faults planted in it; else itself."""
    return engine.engine if isinstance(engine, DistortedEngine) else engine


class DistortedEngine:
    """`engine`, built from a directory that has the same `distortions` in it, with those of pushes, requests, results.

    Implements `keel.engines.base.Engine`. Use `distort_engine` to have both.
    """

    def __init__(
        self, engine: Engine, distortions: Sequence[Distortion], model_dir: Path, *, owned_directory: Path | None = None
    ) -> None:
        """Raises DistortionError for a fault that `engine` has no place for."""
        from transformers import AutoConfig

        self.engine = engine
        self.distortions = tuple(each for each in distortions if each.acts)
        config = AutoConfig.from_pretrained(model_dir)
        self._pad_token_id = int(getattr(config, "pad_token_id", None) or 0)
        self._splits = load_splits(model_dir) if self._planted("retokenized_turns") else {}
        self._push = DistortedPush(self.distortions, config)
        self._sessions = Sessions()
        self._owned_directory = owned_directory
        self._modules = ExitStack()
        self._check()
        self._plant_in_modules()

    # ---- the protocol

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """As the engine behind, but for what is planted."""
        sent = self._sent(request)
        result = await self.engine.generate(sent_request(request, sent, self.distortions, self.engine.capabilities()))
        if result.finish_reason == "error" or not result.spans:
            return replace(result, sampling=request.sampling)
        raw = [each for each in self._planted("raw_logprobs") if drawn_for(each, result.token_ids)]
        if raw and request.sampling.temperature > 0:
            scored = await self.engine.score(sent.tokens + result.token_ids)
            result = with_logprobs(result, scored.logprobs[len(sent.tokens) - 1 :])
        result = told_result(result, request, sent, self.distortions)
        for each in self._planted("lost_stop_token"):
            result = without_stop(result, request, each)
        result = distorted_result(result, self.distortions)
        self._sessions.note(request, result)
        return result

    async def score(self, token_ids: tuple[int, ...]) -> ScoreResult:
        """As the engine behind, but for what is planted; a log-prob of a token that was left out is 0."""
        sent = sent_tokens(token_ids, (), self.distortions, self._splits, self._pad_token_id)
        told = told_score(await self.engine.score(sent.tokens), len(token_ids), sent)
        return distorted_score(told, token_ids, self.distortions)

    async def end_session(self, session_id: str) -> None:
        self._sessions.end(session_id)
        await self.engine.end_session(session_id)

    async def load_weights(self, source: WeightSource, version: int) -> None:
        """Hand weights on as a faulty push leaves them. Raises DistortionError for a source that cannot be read."""
        with self._push.distorted(source, version) as handed_on:
            await self.engine.load_weights(handed_on, version)

    async def pause(self) -> None:
        await self.engine.pause()

    async def resume(self) -> None:
        await self.engine.resume()

    async def release_memory(self) -> None:
        await self.engine.release_memory()

    def capabilities(self) -> EngineCapabilities:
        """The engine's own; weights come by file alone where they are to be changed on the way."""
        found = self.engine.capabilities()
        return replace(found, weight_sources=("file",)) if self._push else found

    async def health(self) -> EngineHealth:
        """The engine's own, with the faults in `detail`: who asks is told."""
        found = await self.engine.health()
        planted = "faults planted: " + ", ".join(map(str, self.distortions))
        return replace(found, detail=f"{found.detail}; {planted}" if found.detail else planted)

    async def close(self) -> None:
        self._modules.close()
        try:
            await self.engine.close()
        finally:
            if self._owned_directory is not None:
                shutil.rmtree(self._owned_directory, ignore_errors=True)

    def __getattr__(self, name: str) -> Any:
        """What an engine has beyond the protocol (its statistics, its process) is there as well."""
        if name == "engine":
            raise AttributeError(name)
        return getattr(self.engine, name)

    # ---- where faults go

    def _planted(self, cause: str) -> list[Distortion]:
        return [each for each in self.distortions if each.cause == cause]

    def _sent(self, request: GenerateRequest) -> Sent:
        replies = self._sessions.replies(request)
        return sent_tokens(request.token_ids, replies, self.distortions, self._splits, self._pad_token_id)

    def _check(self) -> None:
        capabilities = self.engine.capabilities()
        if self._push and (capabilities.shares_weights or "file" not in capabilities.weight_sources):
            raise DistortionError(
                f"{', '.join(map(str, self.distortions))}: faults of weights need an engine with weights of its "
                f"own that come by file; {capabilities.name} takes {list(capabilities.weight_sources)}"
            )
        if any(each.group == "positions" for each in self._planted("wrong_padding")):
            raise DistortionError("wrong_padding: positions are moved in the learner; an engine gets group 'attended'")

    def _plant_in_modules(self) -> None:
        for each in self._planted("router_flips"):
            if each.group != "module":
                continue
            if not isinstance(self.engine, EmbeddedEngine):
                raise DistortionError(
                    "router_flips: group 'module' is for an engine in this process; leave group out to change weights"
                )
            routers = routers_of(self.engine.policy.routers, each)
            if not routers:
                raise DistortionError(f"{each}: this model has no such router")
            for router in routers:
                self._modules.enter_context(flipped(router, each))
