"""What the attribution looks at: probe sequences, and what both sides said of their tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from keel.causes import Side
from keel.types import FinishReason, Routes, SamplingSettings, Support

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reply:
    """Tokens `start` to `stop - 1` of a sequence were drawn in one request.

    `support` is what top-k and top-p left to choose from, if the engine says so; `context_ids` is what the engine says
    it read before the reply, where it does (then it may be compared with what the learner was shown).
    """

    start: int
    stop: int
    finish_reason: FinishReason = "length"
    support: Support | None = None
    context_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ProbeSequence:
    """One sequence of n tokens as the learner is shown it, and the log-probs of its drawn tokens.

    `engine` and `learner` `[n]` stand at the token they are about (nan where there is none: context, and a side that is
    absent is None). `engine_scores [n]` is what the engine's own `score` says of the very same tokens at temperature 1;
    with it, an engine that computes differently is told from one that reads other tokens.
    `engine_routes` and `learner_routes` have a row per token fed, from the first on, where they are known.
    """

    token_ids: tuple[int, ...]
    replies: tuple[Reply, ...]
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    engine: Floats | None = None
    learner: Floats | None = None
    engine_scores: Floats | None = None
    engine_routes: Routes | None = None
    learner_routes: Routes | None = None

    def __post_init__(self) -> None:
        for name in ("engine", "learner", "engine_scores"):
            values = getattr(self, name)
            if values is not None and values.shape != (len(self.token_ids),):
                raise ValueError(
                    f"probe: {name} has shape {values.shape}, the sequence {len(self.token_ids)} tokens; "
                    "give a value per token, nan where there is none"
                )
        edges = [edge for reply in self.replies for edge in (reply.start, reply.stop)]
        if edges != sorted(edges) or (edges and (edges[0] < 1 or edges[-1] > len(self.token_ids))):
            raise ValueError(f"probe: replies at {edges} are not in order within 1 to {len(self.token_ids)}")

    def of(self, side: Side) -> Floats | None:
        """The log-probs of `side`, or None if it is absent."""
        return self.engine if side == "engine" else self.learner

    @property
    def drawn(self) -> list[int]:
        """Positions of the tokens that a reply drew."""
        return [place for reply in self.replies for place in range(reply.start, reply.stop)]


@dataclass(frozen=True)
class StackFacts:
    """What is known of the stack besides its log-probs.

    `dtype` is what both sides claim to compute in. `earlier` holds weights of earlier versions, newest first, as state
    dicts by the names of the `transformers` model (a version may leave out what did not change). `tokenizer` may be any
    object with `decode(ids) -> str` and `encode(text, add_special_tokens=False) -> ids`.
    """

    dtype: str = "float32"
    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    tokenizer: Any = None
    earlier: tuple[Any, ...] = ()
