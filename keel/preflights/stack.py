"""What is being checked: a trainer, an engine and a model, as two small protocols and plain values.

Nothing here knows who made the parts: Keel's own learner and engine, a plain `transformers` model, somebody's server.
Positions: index i of an array [n] is about token i of a sequence; a log-prob at i is that of token i given all before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from keel.engines.base import EngineCapabilities, EngineHealth, GenerateRequest, GenerateResult, ScoreResult
from keel.types import FinishReason, Message, SamplingSettings, Support

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from keel.chat.base import Chat
    from keel.chat.tokenizer import ChatTokenizer
    from keel.config import TrainConfig
    from keel.models.info import ModelInfo
    from keel.sync.base import WeightSender

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
SequenceKind = Literal["conversation", "random"]


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence for the trainer to score. Drawn tokens are scored under `sampling`, context at temperature 1.

    `support` has one row per drawn token where the engine cut the distribution and said to what; then log-probs are
    over that support.
    """

    token_ids: Ints  # [n]
    drawn: Bools  # [n]
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    support: Support | None = None


@dataclass(frozen=True)
class TrainerScores:
    """What the trainer says of a sequence; `logprobs[0]` is NaN, since nothing precedes the first token."""

    logprobs: Floats  # [n]
    routes: npt.NDArray[np.int32] | None = None  # [n - 1, moe layers, k]: the last token is never fed
    margins: Floats | None = None  # [n - 1, moe layers], gap in router logits between chosen and left out


class TrainerSide(Protocol):
    """Who learns. `model` is the real `transformers` module that it runs, `attention` what it runs it with."""

    name: str  # "keel" or "transformers"
    model: PreTrainedModel
    info: ModelInfo
    attention: str
    dtype: str

    def score(self, sequences: Sequence[ScoredSequence], *, with_routes: bool = False) -> list[TrainerScores]:
        """Log-probs as the trainer would compute them in a step, micro-batches and all; no gradient."""
        ...

    def score_alone(self, sequence: ScoredSequence) -> TrainerScores:
        """The same of one sequence with nothing beside it: no packing, no padding."""
        ...

    def loss_gradient(self, sequences: Sequence[ScoredSequence]) -> Mapping[str, float]:
        """Norm of the gradient of the mean drawn log-prob, by parameter name of `model`; no gradient is left behind."""
        ...


class EngineSide(Protocol):
    """Who samples: any `keel.engines.base.Engine`, called from a thread without an event loop.

    `attached` says that the engine is somebody else's server, whose weights are touched only if `may_push`.
    """

    name: str
    attached: bool
    may_push: bool

    def capabilities(self) -> EngineCapabilities: ...

    def health(self) -> EngineHealth: ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        """All at once; in their order. Raises EngineError if the engine fails."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[ScoreResult]:
        """Log-probs at temperature 1. Raises EngineError if the engine fails."""
        ...

    def end_sessions(self, session_ids: Sequence[str]) -> None: ...

    def publish(self, sender: WeightSender, version: int) -> None:
        """Give it new weights, the way a run does. Raises SyncError or EngineError if that fails."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Reply:
    """One reply of a probe: tokens `start` to `stop - 1` of its sequence."""

    start: int
    stop: int
    finish_reason: FinishReason
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class ProbeSequence:
    """A sequence that the engine read and drew, with what it said of the tokens it drew.

    `messages` are those the first prompt was rendered from (empty for random tokens), `turns` what was said to the
    policy before each later reply.
    """

    token_ids: Ints  # [n]
    drawn: Bools  # [n]
    turn: Ints  # [n] number of the reply that drew the token, -1 where context
    engine_logprobs: Floats  # [n], under `sampling` as the engine understood it; NaN where not drawn
    sampling: SamplingSettings  # what was asked for; what the learner would be told
    version: int
    kind: SequenceKind
    replies: tuple[Reply, ...]
    engine_scores: Floats | None = None  # [n] at temperature 1 by the engine's `score`; NaN at 0; None: not scored
    routes: npt.NDArray[np.int32] | None = None  # [n - 1, moe layers, k], -1 where unknown
    support: Support | None = None  # one row per drawn token
    messages: tuple[Message, ...] = ()
    turns: tuple[tuple[Message, ...], ...] = ()

    @property
    def scored(self) -> ScoredSequence:
        """As the trainer is shown it."""
        return ScoredSequence(self.token_ids, self.drawn, self.sampling, self.support)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class ProbeData:
    """What the engine drew, and what both sides say of it: all that an attribution needs.

    `trainer` has one entry per sequence. Gaps are taken at drawn tokens alone. `notes` says what was left out.
    """

    sequences: tuple[ProbeSequence, ...]
    trainer: tuple[TrainerScores, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_drawn(self) -> int:
        return sum(int(sequence.drawn.sum()) for sequence in self.sequences)

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    def engine_logprobs(self) -> Floats:
        """`[num_drawn]`, sequence after sequence."""
        return _joined([each.engine_logprobs[each.drawn] for each in self.sequences])

    def trainer_logprobs(self) -> Floats:
        """`[num_drawn]`, in the same order."""
        pairs = zip(self.sequences, self.trainer, strict=True)
        return _joined([scores.logprobs[each.drawn] for each, scores in pairs])


def _joined(parts: list[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


@dataclass(frozen=True)
class ModelSource:
    """Where the model of the trainer lies; it is read and never written to."""

    path: str
    dtype: str
    revision: str = ""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Stack:
    """All that is checked. `config` is a run's, None for somebody's own stack; `chat` is None if it has no format."""

    source: ModelSource
    trainer: TrainerSide
    engine: EngineSide
    tokenizer: ChatTokenizer | None
    chat: Chat | None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    config: TrainConfig | None = None
    description: Mapping[str, Any] = field(default_factory=dict)
