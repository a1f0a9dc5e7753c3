"""Sequences for the engine to draw: conversations of several turns in the model's own chat format, and random tokens.

Lengths are ragged and cross the sliding window, where there is one. What is drawn depends on the seed and the engine.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from keel.chat.base import Chat, Prompt
from keel.engines.base import EngineError, GenerateRequest, GenerateResult
from keel.preflights.stack import ProbeData, ProbeSequence, Reply, SequenceKind, Stack
from keel.types import MISSING_ROUTE, Message, Routes, SamplingSettings, Support, ToolSpec

LOOKUP = ToolSpec(
    "lookup",
    "Looks a word up.",
    {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
)
TOPICS = (
    "Add 17 and 25, then double the sum.",
    "Why is the sky blue? Two sentences.",
    "Write a function that reverses a list.",
    "Translate 'good morning' into French, Latin and Polish.",
    "A train leaves at 9:40 and takes 2 h 35 min. When does it arrive?",
    "Name three primes above 100 \u2014 and say how you know.",
)
ANSWERS = ("Go on.", "Are you sure? Check each step.", "Thanks. Now say it shorter, in one line.")


@dataclass(frozen=True)
class ProbePlan:
    """How much is drawn: by default some 900 tokens in 24 sequences, a second's work for a tiny model."""

    num_conversations: int = 12
    num_turns: int = 3
    num_random: int = 12
    new_tokens: int = 24
    max_sequence_tokens: int = 512
    seed: int = 0

    @property
    def num_sequences(self) -> int:
        """Sequences that are begun; a conversation that begins anew on the way makes more."""
        return self.num_conversations + self.num_random

    def scaled(self, share: float) -> ProbePlan:
        """With `share` of the sequences, at least two of each kind."""
        return ProbePlan(
            max(2, round(share * self.num_conversations)),
            self.num_turns,
            max(2, round(share * self.num_random)),
            self.new_tokens,
            self.max_sequence_tokens,
            self.seed,
        )


@dataclass
class _Growing:
    """A probe while it grows. `session` lives as long as its tokens are only added to."""

    session: str
    kind: SequenceKind
    prompt: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    tools: tuple[ToolSpec, ...] = ()
    history: list[Message] = field(default_factory=list)
    answers: list[tuple[Message, ...]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    logprobs: dict[int, float] = field(default_factory=dict)
    routes: list[tuple[int, Routes]] = field(default_factory=list)
    supports: list[Support] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    version: int = 0
    ended: bool = False


def draw_probes(stack: Stack, plan: ProbePlan, sampling: SamplingSettings) -> ProbeData:
    """Let the engine draw what `plan` says, turn by turn, all sequences of a turn at once.

    Raises EngineError if the engine fails, or if what it answers is no continuation.
    """
    begun, notes = _begin(stack, plan)
    # A session keeps its place in the engine until it is ended, so no more are begun at once than there are places.
    places = max(1, stack.engine.capabilities().max_concurrency)
    done: list[_Growing] = []
    for start in range(0, len(begun), places):
        growing = dict(enumerate(begun[start : start + places], start))
        try:
            done += _grown(stack, plan, sampling, growing)
        except EngineError:
            _forget(stack, [each.session for each in growing.values()])
            raise
    moe = (stack.trainer.info.num_moe_layers, stack.trainer.info.top_k)
    return ProbeData(tuple(_probe(each, sampling, moe) for each in done), notes=tuple(notes))


def _grown(stack: Stack, plan: ProbePlan, sampling: SamplingSettings, growing: dict[int, _Growing]) -> list[_Growing]:
    """The sequences that come of `growing` (by number), in the order in which they ended."""
    done: list[_Growing] = []
    for turn in range(plan.num_turns):
        requests = [_request(stack, plan, each, turn, index, sampling) for index, each in growing.items()]
        for each, request, result in zip(growing.values(), requests, stack.engine.generate(requests), strict=True):
            _take(each, request, result, stack.trainer.info.vocab_size)
        is_last = turn + 1 == plan.num_turns
        continued = {index: None if is_last else _go_on(stack, plan, each, turn) for index, each in growing.items()}
        over = [each for index, each in growing.items() if continued[index] is not each]
        stack.engine.end_sessions([each.session for each in over])
        done += over
        growing = {index: each for index, each in continued.items() if each is not None}
        if not growing:
            break
    return done


def _forget(stack: Stack, sessions: Sequence[str]) -> None:
    """End sessions of an engine that failed, as far as it still listens."""
    with contextlib.suppress(EngineError):
        stack.engine.end_sessions(sessions)


def random_tokens(stack: Stack, rng: random.Random, size: int) -> tuple[int, ...]:
    """Ids that stand for ordinary text, so that no engine and no template reads anything into them."""
    tokenizer = stack.tokenizer
    size_of_head = stack.trainer.info.vocab_size
    if tokenizer is None:
        return tuple(rng.randrange(size_of_head) for _ in range(size))
    plain = sorted(token for token in tokenizer.known_ids - tokenizer.special_ids if token < size_of_head)
    return tuple(rng.choice(plain) for _ in range(size))


def probe_lengths(stack: Stack, room: int, count: int) -> list[int]:
    """Prompt lengths around and beyond each sliding window, at most `room`."""
    windows = sorted({window for window in stack.trainer.info.layer_windows if window})
    wanted = [5, 17, 40]
    for window in windows:
        wanted += [window - 9, window + 3, 2 * window + 7, 3 * window]
    fitting = [length for length in wanted if 1 < length <= room] or [max(2, min(8, room))]
    return [fitting[index % len(fitting)] for index in range(count)]


def _begin(stack: Stack, plan: ProbePlan) -> tuple[list[_Growing], list[str]]:
    rng = random.Random(plan.seed)
    notes: list[str] = []
    room = plan.max_sequence_tokens - plan.num_turns * (plan.new_tokens + 8)
    growing: list[_Growing] = []
    for length in probe_lengths(stack, room, plan.num_random):
        prompt = random_tokens(stack, rng, length)
        growing.append(_Growing(f"preflight-{plan.seed}-{len(growing)}", "random", prompt))
    chat = stack.chat
    for index in range(plan.num_conversations if chat is not None else 0):
        assert chat is not None
        messages: tuple[Message, ...] = (Message("user", f"{rng.choice(TOPICS)} ({rng.randrange(1000)})"),)
        if index % 3 == 2:
            messages = (Message("system", "Answer briefly."), *messages)
        tools = (LOOKUP,) if index % 4 == 1 else ()
        prompt = chat.start(messages, tools).token_ids
        if len(prompt) > plan.max_sequence_tokens - plan.new_tokens:
            notes.append(f"a conversation of {len(prompt)} tokens does not fit {plan.max_sequence_tokens}; left out")
            continue
        name = f"preflight-{plan.seed}-{len(growing)}"
        growing.append(_Growing(name, "conversation", prompt, messages, tools, list(messages)))
    return growing, sorted(set(notes))


def _request(
    stack: Stack, plan: ProbePlan, each: _Growing, turn: int, index: int, sampling: SamplingSettings
) -> GenerateRequest:
    stops = stack.chat.stop_token_ids if stack.chat is not None and each.kind == "conversation" else ()
    able = stack.engine.capabilities()
    return GenerateRequest(
        request_id=f"{each.session}-{turn}",
        session_id=each.session,
        token_ids=each.prompt,
        sampling=sampling,
        # Odd lengths too, so that replies do not all end at the same place.
        max_new_tokens=min(plan.new_tokens + index % 5, plan.max_sequence_tokens - len(each.prompt)),
        stop_token_ids=stops,
        seed=1 + 1009 * plan.seed + 31 * index + turn,
        return_routes=able.returns_routes and stack.trainer.info.num_moe_layers > 0,
        return_support=able.returns_support and (sampling.top_k > 0 or sampling.top_p < 1),
    )


def _take(each: _Growing, request: GenerateRequest, result: GenerateResult, vocab_size: int) -> None:
    """Add what was drawn. Raises EngineError for a result that is none."""
    ids = result.token_ids
    logprobs = [value for span in result.spans for value in span.logprobs]
    problem = result.error if result.finish_reason == "error" else None
    if problem is None and not ids:
        problem = "no token was drawn"
    if problem is None and len(ids) != len(logprobs):
        problem = f"{len(ids)} tokens and {len(logprobs)} log-probs"
    if problem is None and (min(ids) < 0 or max(ids) >= vocab_size):
        problem = f"a token id of {max(ids)}, and the model has {vocab_size}"
    if problem is None and not all(np.isfinite(logprobs)):
        problem = "a log-prob that is no number"
    if problem is not None:
        raise EngineError(f"generate: {problem} (request {request.request_id}, {len(request.token_ids)} tokens)")
    start = len(request.token_ids)
    each.tokens = (*request.token_ids, *ids)
    each.replies.append(Reply(start, start + len(ids), result.finish_reason, result.num_cached_tokens))
    each.supports += [span.support for span in result.spans if span.support is not None]
    each.logprobs |= {start + index: float(value) for index, value in enumerate(logprobs)}
    each.version = result.spans[-1].policy_version
    if result.routed_experts is not None:
        each.routes.append((result.routes_start, result.routed_experts))


def _go_on(stack: Stack, plan: ProbePlan, each: _Growing, turn: int) -> _Growing | None:
    """The sequence to continue: `each` itself, another where the chat format begins anew, None if it is over."""
    rng = random.Random(f"{plan.seed}/{each.session}/{turn}")
    if each.kind == "random" or stack.chat is None:
        if turn >= 1:
            return None  # two replies cross one border of a session; single-turn probes are the conversations' business
        prompt = Prompt((*each.tokens, *random_tokens(stack, rng, 7)), extends=True)
        answer: tuple[Message, ...] = ()
    else:
        last = each.replies[-1]
        reply = stack.chat.parse(each.tokens[last.start : last.stop])
        each.history.extend(reply.messages)
        answer = (Message("user", rng.choice(ANSWERS)),)
        prompt = _extended(stack.chat, each, answer)
    if len(prompt.token_ids) + plan.new_tokens > plan.max_sequence_tokens:
        return None
    if prompt.extends:
        each.prompt = prompt.token_ids
        each.answers.append(answer)
        return each
    fresh = _Growing(f"{each.session}-{turn}", each.kind, prompt.token_ids, each.messages, each.tools)
    fresh.history, fresh.answers = [*each.history], [*each.answers, answer]
    return fresh


def _extended(chat: Chat, each: _Growing, answer: Sequence[Message]) -> Prompt:
    prompt = chat.extend(each.tokens, tuple(each.history), tuple(answer), each.tools)
    each.history.extend(answer)
    return prompt


def _probe(each: _Growing, sampling: SamplingSettings, moe: tuple[int, int]) -> ProbeSequence:
    logprobs = np.full(len(each.tokens), np.nan, np.float32)
    logprobs[list(each.logprobs)] = list(each.logprobs.values())
    turn = np.full(len(each.tokens), -1, np.int64)
    for number, reply in enumerate(each.replies):
        turn[reply.start : reply.stop] = number
    drawn = turn >= 0
    support = Support(
        tuple(count for part in each.supports for count in part.counts), b"".join(part.ids for part in each.supports)
    )
    return ProbeSequence(
        token_ids=np.array(each.tokens, np.int64),
        drawn=drawn,
        turn=turn,
        engine_logprobs=logprobs,
        sampling=sampling,
        version=each.version,
        kind=each.kind,
        replies=tuple(each.replies),
        routes=_joined_routes(each, moe),
        support=support if len(support) == int(drawn.sum()) else None,
        messages=each.messages,
        turns=tuple(each.answers),
    )


def _joined_routes(each: _Growing, moe: tuple[int, int]) -> npt.NDArray[np.int32] | None:
    """Rows of all tokens but the last, -1 where unknown; None if the engine returned none."""
    if not each.routes:
        return None
    rows = np.full((len(each.tokens) - 1, *moe), -1, np.int32)
    for start, routes in each.routes:
        if routes.shape[1:] != moe:
            raise EngineError(f"routes: the engine's are {routes.shape[1:]} (layers, experts), the trainer's {moe}")
        found = np.frombuffer(routes.data, np.uint16).reshape(routes.shape).astype(np.int32)
        found[found == MISSING_ROUTE] = -1
        rows[start : start + len(found)] = found[: len(rows) - start]
    return rows
