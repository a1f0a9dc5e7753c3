"""The data that flows through Keel: plain, immutable, picklable, no torch.

A run turns `Task`s into `Trajectory`s and compares attempts at the same task inside a `Group`.
The token half of a trajectory (`Segment`, `TokenSpan`) is exactly what the engine read and drew;
the readable half (`Turn`, `Message`) points into it and is never tokenized again.

Worked example, one episode of two turns in one segment:

    span 0  context  <|start|>system ... <|start|>assistant                 prompt
    span 1  policy   <|channel|>commentary to=functions.calculator ...<|call|>   drawn, version 7
    span 2  context  <|start|>functions.calculator ... <|start|>assistant   tool reply
    span 3  policy   <|channel|>final<|message|>42<|return|>                drawn, version 7
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]
Origin = Literal["context", "policy", "demonstration"]
FinishReason = Literal["stop", "length", "abort", "error"]
TrajectoryStatus = Literal[
    "completed",  # the episode ended by itself; its reward counts
    "truncated",  # a length or turn limit ended it; its reward counts
    "env_error",  # the environment (or a tool's host) failed: leaves before group statistics
    "env_timeout",  # the environment did not answer in time: likewise
    "engine_error",  # the engine failed or aborted: likewise
]
FAILED_STATUSES: frozenset[str] = frozenset({"env_error", "env_timeout", "engine_error"})
MISSING_ROUTE = 0xFFFF
"""Stands in `Routes` where no expert choice is known (a token that was never fed to the model)."""


class Fault(Exception):  # noqa: N818 (its kinds end in Error)
    """Something went wrong, and the text says all there is to know: what, got and fix. A command line prints it without
    a traceback and exits with `exit_code`: 1, because it gave way while it ran."""

    exit_code = 1


class UserFault(Fault):
    """The config, an argument, or what they name has to be mended before this can work."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. `channel`, `recipient` and `content_type` follow Harmony's header fields.

    A tool call is an assistant message with a `recipient` ("functions.calculator"); a tool's answer has
    role "tool" and the tool's full name in `name`.
    """

    role: Role
    content: str
    channel: str | None = None
    recipient: str | None = None
    name: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What a chat format needs to describe a tool: `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. `data` is JSON-serializable; `id` is stable (a content hash unless the source has its own)."""

    id: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """The distribution a token is drawn from: softmax(logits / temperature), cut to top-k, then to top-p.

    `temperature` 0 is greedy (its log-prob is 0 by definition); `top_k` 0 and `top_p` 1.0 cut nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def is_cut(self) -> bool:
        """Is anything left out that the model would say?"""
        return self.top_p < 1.0 or self.top_k > 0


@dataclass(frozen=True, slots=True)
class Routes:
    """Expert choices of a mixture-of-experts model, `[num_tokens, num_layers, top_k]`, unsigned 16 bit.

    `data` is row-major and in native byte order; `MISSING_ROUTE` marks an unknown entry.
    """

    data: bytes
    num_tokens: int
    num_layers: int
    top_k: int

    def __post_init__(self) -> None:
        expected = 2 * self.num_tokens * self.num_layers * self.top_k
        if len(self.data) != expected:
            raise ValueError(f"routes: got {len(self.data)} bytes, shape {self.shape} needs {expected}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.num_tokens, self.num_layers, self.top_k)

    @property
    def row_bytes(self) -> int:
        return 2 * self.num_layers * self.top_k

    def rows(self, start: int, stop: int) -> Routes:
        """The routes of tokens `start` to `stop - 1`."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"routes: rows {start}:{stop} of {self.num_tokens}")
        data = self.data[start * self.row_bytes : stop * self.row_bytes]
        return Routes(data, stop - start, self.num_layers, self.top_k)

    @classmethod
    def missing(cls, num_tokens: int, num_layers: int, top_k: int) -> Routes:
        values = array("H", [MISSING_ROUTE]) * (num_tokens * num_layers * top_k)
        return cls(values.tobytes(), num_tokens, num_layers, top_k)

    @classmethod
    def join(cls, parts: Sequence[Routes]) -> Routes:
        if not parts or len({(part.num_layers, part.top_k) for part in parts}) != 1:
            raise ValueError("routes: can only join at least one part, all of the same layers and top_k")
        first = parts[0]
        data = b"".join(part.data for part in parts)
        return cls(data, sum(part.num_tokens for part in parts), first.num_layers, first.top_k)


@dataclass(frozen=True, slots=True)
class Support:
    """What top-k and top-p left to choose from, for each of some drawn tokens, in their order.

    `counts [n]` is how many tokens each had, `ids` their ids as unsigned 32 bit in native byte order, row after row.
    The drawn token is always among them. A count of 0 says that nothing was cut there.
    """

    counts: tuple[int, ...]
    ids: bytes

    def __post_init__(self) -> None:
        if len(self.ids) != 4 * sum(self.counts):
            raise ValueError(f"support: got {len(self.ids)} bytes, {sum(self.counts)} ids need {4 * sum(self.counts)}")

    def __len__(self) -> int:
        return len(self.counts)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Consecutive tokens of one origin. `n = len(token_ids)`.

    `logprobs [n]` (natural log, under the distribution really drawn from), `policy_version` and `sampling` are
    there for origin "policy" only. `routed_experts [n, layers, k]` is there if the engine captured it, `support` if
    the distribution was cut and the engine says to what.
    """

    token_ids: tuple[int, ...]
    origin: Origin
    logprobs: tuple[float, ...] | None = None
    policy_version: int | None = None
    sampling: SamplingSettings | None = None
    routed_experts: Routes | None = None
    support: Support | None = None

    def __post_init__(self) -> None:
        if self.support is not None and len(self.support) != len(self.token_ids):
            raise ValueError(f"span: {len(self.token_ids)} tokens but {len(self.support)} rows of support")
        if (self.logprobs is not None) != (self.origin == "policy"):
            raise ValueError(f"span of origin {self.origin!r}: log-probs belong to policy tokens, and to all of them")
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"span: {len(self.token_ids)} tokens but {len(self.logprobs)} log-probs")
        if self.origin == "policy" and (self.policy_version is None or self.sampling is None):
            raise ValueError("span of origin 'policy' needs its policy_version and sampling settings")
        if self.routed_experts is not None and self.routed_experts.num_tokens != len(self.token_ids):
            raise ValueError(f"span: {len(self.token_ids)} tokens but {self.routed_experts.num_tokens} rows of routes")

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Segment:
    """Spans of one sequence that only ever grew; their concatenation is what the engine saw, token for token."""

    spans: tuple[TokenSpan, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for span in self.spans for token in span.token_ids)

    def __len__(self) -> int:
        return sum(len(span) for span in self.spans)

    def __iter__(self) -> Iterator[TokenSpan]:
        return iter(self.spans)


@dataclass(frozen=True, slots=True)
class Turn:
    """The readable half of one exchange.

    `reply` is what the policy said (parsed), `malformed` why it could not be parsed (else None), `observation`
    what the environment answered. `segment` and `span` locate the reply's tokens; seconds are wall clock.
    `dropped` says what of earlier turns the chat format left out of this turn's prompt.
    """

    reply: tuple[Message, ...]
    reply_text: str
    finish_reason: FinishReason
    segment: int
    span: int
    malformed: str | None = None
    observation: tuple[Message, ...] = ()
    generate_s: float = 0.0
    env_s: float = 0.0
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished episode: `attempt` of `group_id` at `task`."""

    task: Task
    group_id: str
    attempt: int
    prompt: tuple[Message, ...]
    turns: tuple[Turn, ...]
    segments: tuple[Segment, ...]
    status: TrajectoryStatus
    reward: float = 0.0
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    success: bool | None = None
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Did the world (not the policy) end it? Then it has no reward, not a reward of zero."""
        return self.status in FAILED_STATUSES

    @property
    def num_policy_tokens(self) -> int:
        return sum(len(span) for segment in self.segments for span in segment if span.origin == "policy")

    @property
    def num_tokens(self) -> int:
        return sum(len(segment) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Group:
    """All attempts at one task: the unit of advantage, filtering and logging."""

    id: str
    task: Task
    trajectories: tuple[Trajectory, ...]

    @property
    def kept(self) -> tuple[Trajectory, ...]:
        """Attempts the world did not spoil."""
        return tuple(trajectory for trajectory in self.trajectories if not trajectory.failed)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is done with a gradient: "go" steps, "skip" leaves the weights as they are, "stop" skips and ends the run.

    "interrupt" is the user's: the step counts, and the run ends after it, to be resumed. `reason` is empty for "go" and
    says what was seen otherwise.
    """

    action: Literal["go", "skip", "stop", "interrupt"] = "go"
    reason: str = ""

    @property
    def goes(self) -> bool:
        return self.action == "go"

    @property
    def stops(self) -> bool:
        return self.action in ("stop", "interrupt")
