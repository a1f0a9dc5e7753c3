"""A world in which every hostile string is everything at once: task, data, prompt, reply, tool output, name, error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from keel.chat.base import Reply
from keel.chat.tokenizer import load_tokenizer
from keel.config import EngineConfig, ModelConfig
from keel.engines.base import (
    DrawnSpan,
    EngineCapabilities,
    EngineHealth,
    GenerateRequest,
    GenerateResult,
    ScoreResult,
    WeightSource,
)
from keel.envs.base import Env, Split, Step
from keel.types import Message, Task
from tests.hostile import HOSTILE, SMALL

NAMES = list(HOSTILE)
FAILS_WITH = ("osc_clipboard", "rich_markup", "lone_surrogates", "script_end", "huge")


class Hostile(Env):
    """Two replies an episode. Ids are the strings themselves but for the huge one, whose id is a short one."""

    def tasks(self, split: Split) -> Sequence[Task]:
        return [Task(SMALL.get(name, name), {"name": name, "text": HOSTILE[name], "nested": [SMALL]}) for name in NAMES]

    def reset(self, task: Task) -> Sequence[Message]:
        self.text = SMALL.get(task.data["name"], "Go.")
        self.name = task.data["name"]
        self.turn = 0
        return [Message("user", self.text)]

    def step(self, reply: Reply) -> Step:
        self.turn += 1
        if self.turn == 2 and self.name in FAILS_WITH and len(reply.text) % 2:
            raise ValueError(HOSTILE[self.name])
        text = HOSTILE[self.name]
        answer = Message("tool", text, channel="commentary", name="functions.look")
        return Step(
            () if self.turn == 2 else (answer,),
            reward=float(len(reply.text) % 3),
            done=self.turn == 2,
            reward_parts={text: 0.5},
            metrics={text: 1.0},
        )


class Parrot:
    """An engine that says each hostile string in turn, special tokens included, whatever it is asked."""

    def __init__(self, model: ModelConfig, config: EngineConfig, *, max_sequence_tokens: int) -> None:
        self._tokenizer = load_tokenizer(model.path)
        self._texts = itertools.cycle([text for name, text in SMALL.items() if name not in ("empty", "stacked_marks")])
        self._limit = max_sequence_tokens
        self._version = 0

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        text = f"<|channel|>final<|message|>{next(self._texts)}<|return|>"
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # what tokens can spell
        ids = self._tokenizer.encode(text, add_special_tokens=False)[: request.max_new_tokens]
        span = DrawnSpan(tuple(ids), (-1.0,) * len(ids), self._version)
        finish = "stop" if ids[-1] in request.stop_token_ids else "length"
        return GenerateResult(request.request_id, (span,), finish, request.sampling)

    async def score(self, token_ids: tuple[int, ...]) -> ScoreResult:
        raise NotImplementedError

    async def end_session(self, session_id: str) -> None: ...

    async def load_weights(self, source: WeightSource, version: int) -> None:
        self._version = version

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def release_memory(self) -> None: ...

    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            "parrot",
            self._limit,
            8,
            returns_routes=False,
            keeps_prefix=False,
            shares_weights=False,
            weight_sources=("file",),
            deterministic=False,
        )

    async def health(self) -> EngineHealth:
        return EngineHealth(True, self._version, 0, 0)

    async def close(self) -> None: ...
